"""What a run starts from and what it makes of it: arguments enter, leave the model's folder and the settings its
attention has at the end, checked against each other and against the length of the blocks."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from ..config import SparseAttentionConfig
from ..loading import Source, check_record, check_settings, companions_of, find_model, make_settings
from ..maps import MAPS, ASEntmaxScale
from ..models import check_convertible, dense_config, sparse_config, sparse_layers, with_rope
from ..text import load_tokenizer
from .arguments import TrainArguments
from .head import scales_logits
from .lengths import parse_block_sizes


def find_source(arguments: TrainArguments) -> Source:
    """The folder of the model, with the rotary positions that are asked for.

    Raises:
        ValueError: for a family that cannot be converted, one whose loss is not that of its tokens alone, or a
            converted folder whose weights changed.
    """
    source = find_model(arguments.model, arguments.revision, _check_family)
    if source.is_sparse:
        check_record(source)
    if getattr(source.config, "output_router_logits", False):
        raise ValueError(
            f"{arguments.model} has output_router_logits: its auxiliary loss would be added to every part of a batch. "
            "Set it to false in config.json to train on the tokens alone"
        )
    rope = {"theta": arguments.rope_theta, "yarn": arguments.rope_yarn, "max_positions": arguments.max_positions}
    return replace(source, config=with_rope(source.config, **rope))


def _check_family(config: PreTrainedConfig) -> None:
    """Dense models of other families are refused even as a control: packed documents might see each other."""
    if getattr(config, "sparse_attention", None) is None:
        check_convertible(config)


def changed_rope(source: Source) -> str:
    """The options with which `convert` gave a folder other rotary positions than the dense model's, as words."""
    names = ("rope_theta", "rope_yarn", "max_positions")
    return ", ".join(f"{name} {source.record[name]}" for name in names if source.record.get(name) is not None)


def find_teacher(arguments: TrainArguments, source: Source) -> Source | None:
    """The dense model that is distilled, None without one. In a folder of `convert` it is the dense model it was.

    Args:
        source: of the model that learns from it.

    Raises:
        ValueError: for a model that is not dense, or one whose logits cannot be compared.
        OSError: if it is not there or damaged.
    """
    name = arguments.distill
    if name is None:
        return None
    teacher = find_model(name, arguments.distill_revision, _check_family)
    if teacher.is_sparse:
        check_record(teacher)
        if not teacher.is_untrained:
            raise ValueError(f"distill is {name}, which is sparse and was trained: name a dense model")
        if changed := changed_rope(teacher):
            raise ValueError(
                f"distill is {name}, which was converted with {changed}: the dense model in it has those positions "
                "too. Name the dense model itself"
            )
        teacher = replace(teacher, config=dense_config(teacher.config))
    sizes = [each.config.get_text_config().vocab_size for each in (teacher, source)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"distill is {name} with a vocabulary of {sizes[0]}, the model has one of {sizes[1]}: their logits cannot "
            "be compared"
        )
    for each in (teacher, source):
        if scales_logits(each.config):
            raise ValueError(
                f"{each.name} ({each.config.model_type}) scales or bounds its logits, which distill does not compute: "
                "leave it out"
            )
    _check_same_tokens(teacher, source)
    longest = parse_block_sizes(arguments.block_size or default_block_size(source))[-1][0]
    if longest > (limit := positions_of(teacher) or longest):
        raise ValueError(
            f"block_size is {longest}, but distill is {name}, which has rotary positions up to {limit} "
            "(max_position_embeddings): use shorter blocks, or learn from it in a stage that has them"
        )
    return teacher


def _check_same_tokens(teacher: Source, source: Source) -> None:
    """Two vocabularies of one size can be of different tokens. Added ones may differ, as chat models rename them."""
    folders = [each.folder for each in (teacher, source)]
    if not all(any(file.name.startswith("tokenizer") for file in companions_of(folder)) for folder in folders):
        return
    tokens = []
    for each in (teacher, source):
        tokenizer = load_tokenizer(each.folder, each.config.get_text_config().vocab_size)
        added = tokenizer.get_added_vocab()
        tokens.append({number: token for token, number in tokenizer.get_vocab().items() if token not in added})
    one, other = tokens
    if different := [number for number in one.keys() & other.keys() if one[number] != other[number]]:
        first = min(different)
        raise ValueError(
            f"distill is {teacher.name}, whose token {first} is {one[first]!r} where the model's is {other[first]!r} "
            f"({len(different):,} differ): it has another tokenizer, and their logits cannot be compared"
        )


def default_block_size(source: Source) -> int:
    return min(positions_of(source) or 2048, 2048)


def positions_of(source: Source) -> int | None:
    return getattr(source.config.get_text_config(), "max_position_embeddings", None)


def settings_of(source: Source, arguments: TrainArguments, block_size: int) -> SparseAttentionConfig | None:
    """What the attention computes at the end of the run; None for a dense model as it is."""
    if arguments.map == "none":
        if source.is_sparse:
            raise ValueError(
                f"map is 'none', but {arguments.model} is sparse; the control starts from the dense model"
            )
        return None
    if not source.is_sparse:
        if arguments.lora_rank and arguments.lora_save == "adapter":
            raise ValueError(
                "lora_save is 'adapter', which needs a sparse model to sit on later: convert the dense model first, "
                "or use merge"
            )
        settings = make_settings(
            arguments.map or "asentmax", arguments.alpha, arguments.position or "rope", arguments.layers or "all",
            block_size, arguments.heads or "all",
        )  # fmt: skip
        return check_settings(source, settings)
    saved = SparseAttentionConfig.from_model_config(source.config)
    asked = make_settings(
        arguments.map or saved.map,
        saved.alpha if arguments.alpha is None else arguments.alpha,
        arguments.position or saved.position,
        "all",
        saved.train_length,
    )
    if arguments.scale_start is not None and not source.is_untrained:
        raise ValueError(
            f"scale_start is {arguments.scale_start!r}, but {arguments.model} was trained with its factors: leave it "
            "out, or start from the dense model"
        )
    different = [name for name in ("map", "position") if getattr(asked, name) != getattr(saved, name)]
    different += [name for name in ("layers", "heads") if getattr(arguments, name) is not None]
    if different:
        names = ", ".join(different)
        raise ValueError(
            f"{arguments.model} is already sparse ({saved.map}, {saved.position}): its {names} cannot change"
        )
    if arguments.lora_rank and arguments.lora_save == "adapter" and asked.alpha != saved.alpha:
        raise ValueError(
            f"lora_save is 'adapter', which cannot change the model's alpha from {saved.alpha} to {asked.alpha}"
        )
    return SparseAttentionConfig.from_dict({**saved.to_dict(), "alpha": asked.alpha})


def alpha_schedule_of(arguments: TrainArguments, source: Source, settings: SparseAttentionConfig | None) -> str | None:
    """How alpha rises where that was not said: linear for a model that only knows softmax, else none."""
    if arguments.alpha_schedule is not None or settings is None:
        return arguments.alpha_schedule
    rises = source.is_untrained or arguments.alpha_start is not None or arguments.alpha_plateaus is not None
    return "linear" if rises and settings.alpha > 1 else "none"


def check_fit(source: Source, settings: SparseAttentionConfig | None, arguments: TrainArguments) -> None:
    """Raises ValueError for options that this model and map have no use for."""
    row = None if settings is None else MAPS[settings.map]
    if arguments.new_learning_rate is not None and not row.has_parameters:
        raise ValueError(
            f"new_learning_rate is {arguments.new_learning_rate}, but {settings.map} has no new parameters: leave "
            "it out"
        )
    if arguments.scale_start is not None and row.scale is not ASEntmaxScale:
        raise ValueError(
            f"scale_start is {arguments.scale_start!r}, which only asentmax has; map is {settings.map!r}: leave it out"
        )
    schedule = (arguments.alpha_schedule or "none") != "none"
    alphas = [name for name in ("alpha_start", "alpha_plateaus") if getattr(arguments, name) is not None]
    alphas += ["alpha_schedule"] if schedule else []
    if settings is not None and settings.alpha == 1 and alphas:
        raise ValueError(
            f"{', '.join(alphas)} would raise alpha, which is 1 throughout with {settings.map}: leave out"
        )
    if settings is not None and (arguments.alpha_start or 1) > settings.alpha:
        raise ValueError(f"alpha_start is {arguments.alpha_start}, above the alpha at the end, {settings.alpha:g}")
    rope = [name for name in ("rope_theta", "rope_yarn", "max_positions") if getattr(arguments, name) is not None]
    if rope and arguments.lora_save == "adapter":
        raise ValueError(
            f"lora_save is 'adapter', which cannot change {', '.join(rope)} of the model: convert with them first"
        )
    if settings is not None and row.learned_alpha and settings.alpha == 1:
        raise ValueError(
            f"alpha is 1, from which {settings.map} learns nothing: it would be softmax to the end. Use a higher alpha"
        )
    learned_alone = settings is not None and row.learned_alpha and row.scale is None and arguments.trained == "map"
    rises_from_1 = alpha_schedule_of(arguments, source, settings) != "none" and arguments.alpha_start in (None, 1)
    if learned_alone and arguments.stage != "match" and rises_from_1:
        raise ValueError(
            f"trained is 'map', but {settings.map} learns nothing while alpha is 1: use --alpha_start 1.01, or "
            "--trained attention"
        )
    if arguments.stage != "match":
        return
    if row.learned_alpha and arguments.alpha_start == 1:
        raise ValueError(f"stage is 'match', but {settings.map} learns nothing while alpha is 1: use a higher alpha")
    if not source.is_untrained:
        raise ValueError(
            f"stage is 'match', but {arguments.model} was trained since it was converted, and its layers no longer "
            "know the dense model's: match first, from the dense model"
        )
    if rope:
        raise ValueError(f"stage is 'match', where {', '.join(rope)} would change the dense layers too: extend later")
    if arguments.lora_save == "adapter":
        raise ValueError("lora_save is 'adapter', but stage 'match' leaves a whole model to go on from: use merge")


def check_block_size(
    source: Source, settings: SparseAttentionConfig | None, block_size: int, *, matches: bool = False
) -> None:
    """matches: whether layers learn from the dense model's, which rotate whatever the sparse ones do."""
    rotates = matches or settings is None or settings.position == "rope"
    if not rotates:
        config = source.config if source.is_sparse else sparse_config(source.config, settings)
        rotates = len(sparse_layers(config)) < config.num_hidden_layers
    limit = positions_of(source)
    if rotates and limit is not None and block_size > limit:
        raise ValueError(
            f"block_size is {block_size}, but {source.name} has rotary positions up to {limit} "
            "(max_position_embeddings): use shorter blocks"
            + ("" if matches else ", --rope_theta or --rope_yarn, or --position nape")
        )
