"""What is known about a model -> its model card. Every number comes from a file that convert, train, evaluate or
report wrote; one that is not there is said to be missing. The text around them is data/model_cards/template.md."""

from __future__ import annotations

import re
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import tables
from ..config import LAYERS, POSITIONS, SparseAttentionConfig
from ..maps import MAPS
from ..results import mean_over_depths, remarks, sections
from .content import auto_class, data_file
from .evidence import HUB_ID, Evidence, Licence, local_name, without_folders

MISSING = "missing"
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_SPARSITY = {
    "visible": ("keys a query sees, mean", "{:.1f}"),
    "support": ("keys that carry weight, mean", "{:.1f}"),
    "zeros": ("visible keys whose weight is exactly 0", "{:.1%}"),
    "block_sparsity": ("visible tiles of 64 x 64 without any weight", "{:.1%}"),
    "scale": ("factor on the query, mean", "{:.3f}"),
}


def render(evidence: Evidence, *, name: str, repo_id: str | None, revision: str | None) -> str:
    """The text of README.md, its metadata read back by huggingface_hub.

    Args:
        name: what the model is called.
        repo_id: where it will be on the Hub, if that is known.
        revision: the branch it will be on, if not the main one.

    Raises:
        ValueError: if the metadata are not what the Hub accepts.
    """
    settings = evidence.checkpoint.sparse
    body = Template(data_file("model_cards/template.md").decode()).substitute(
        name=name,
        introduction=_introduction(evidence),
        status=_status(evidence),
        auto_class=auto_class(evidence.checkpoint),
        location=repo_id or f"path/to/{name}",
        revision=f', revision="{revision}"' if revision else "",
        attention=_attention(settings),
        training=_training(evidence),
        results=_results(evidence),
        sparsity=_sparsity(evidence),
        limits=_limits(evidence),
        licence=_licence(evidence.licence),
        citation=_citation(settings),
    )
    body = body.replace("import AutoModelForCausalLM", f"import {auto_class(evidence.checkpoint)}")
    data = _metadata(evidence, name)
    content = f"---\n{data.to_yaml()}\n---\n\n{body}"
    if ModelCard(content).data.to_dict() != data.to_dict():
        raise ValueError(f"the metadata of the model card do not survive being read back: {data.to_dict()}")
    return content


def _metadata(evidence: Evidence, name: str) -> ModelCardData:
    settings, base, licence = evidence.checkpoint.sparse, evidence.base, evidence.licence
    has_link = licence.name == "other" and licence.file is not None
    relation = {"base_model": base.hub_id, "base_model_relation": "finetune"} if base and base.hub_id else {}
    causal = auto_class(evidence.checkpoint) == "AutoModelForCausalLM"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        license=licence.name,
        license_name="as-the-base-model" if has_link else None,
        license_link=licence.file.name if has_link else None,
        tags=["hf-sparse-attention", "sparse-attention", settings.map, *_arxiv(settings)],
        datasets=_hub_datasets(evidence) or None,
        model_name=name,
        eval_results=_eval_results(evidence) or None,
        **relation,
    )  # fmt: skip


def _eval_results(evidence: Evidence) -> list[EvalResult]:
    results = evidence.results
    if results is None:
        return []
    own = [cell for cell in results["cells"] if cell["model"] == evidence.label]
    return _perplexities(results, own) + _exact_matches(own)


def _perplexities(results: dict, cells: list[dict]) -> list[EvalResult]:
    names = results["data"]["names"]
    dataset = names[0] if len(names) == 1 and HUB_ID.fullmatch(names[0]) else "text"
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=dataset,
            dataset_name=", ".join(names),
            dataset_args={"documents": results["data"]["documents"], "sha256": results["data"]["sha256"]},
            metric_type="perplexity",
            metric_name=f"perplexity, windows of {cell['length']} tokens",
            metric_value=cell["perplexity"],
        )
        for cell in cells
        if cell["task"] == "perplexity" and cell.get("perplexity") is not None
    ]


def _exact_matches(cells: list[dict]) -> list[EvalResult]:
    """One result for each needle or synthetic task and length, the mean over its depths."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        if cell.get("exact_match") is not None:
            groups.setdefault((cell["task"], cell["length"]), []).append(cell)
    return [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_type=task,
            dataset_name=f"{task} of hf-sparse-attention",
            metric_type="exact_match",
            metric_name=f"exact match at {length} tokens" + (", mean over depths" if len(group) > 1 else ""),
            metric_value=mean_over_depths(group)["exact_match"],
        )
        for (task, length), group in groups.items()
    ]


def _hub_datasets(evidence: Evidence) -> list[str]:
    names = (evidence.summary or {}).get("train_data", [])
    return [name.partition(":")[0] for name in names if re.fullmatch(rf"{HUB_ID.pattern}(:[\w.-]+)?", name)
            and not re.search(r"\.(txt|md|jsonl|ndjson|json|parquet|xz|gz|zst)$", name)]  # fmt: skip


def _introduction(evidence: Evidence) -> str:
    config, settings = evidence.checkpoint.config, evidence.checkpoint.sparse
    family = config.model_type.removeprefix("sparse_")
    return (
        f"A {family} model of {evidence.parameters:,} parameters whose attention is `{settings.map}` instead of "
        "softmax"
        + (
            "."
            if MAPS[settings.map].softmax or settings.alpha == 1
            else ": most keys can get a weight of exactly zero."
        )
    )


def _base_name(evidence: Evidence) -> str:
    base = evidence.base
    if base is None:
        return MISSING
    if base.hub_id is None:
        return f"`{base.name}`, a folder of the machine it was made on"
    return f"[{base.name}](https://huggingface.co/{base.name}), commit `{base.commit}`"


def _status(evidence: Evidence) -> str:
    summary = evidence.summary
    if summary is not None:
        return (
            f"Base model: {_base_name(evidence)}. Its attention was replaced, and its pretraining continued for "
            f"{_whole(summary.get('steps'))} steps over {_whole(summary.get('tokens'))} tokens."
        )
    if evidence.conversion is not None:
        same = ": it computes what the base model computes" if evidence.checkpoint.sparse.alpha == 1 else ""
        return (
            f"Base model: {_base_name(evidence)}. Its attention was replaced; **it was not trained since**{same}. No "
            "training summary was found."
        )
    return f"Base model: {MISSING}. How the model was trained is {MISSING}: there is no training summary."


def _attention(settings: SparseAttentionConfig) -> str:
    row = MAPS[settings.map]
    layers = LAYERS[settings.layers] if isinstance(settings.layers, str) else ", ".join(map(str, settings.layers))
    rows = [
        ["map", f"`{row.name}`"],
        ["weights", f"`{row.formula}`"],
        ["alpha of this model", f"{settings.alpha:g}" + (" (softmax)" if settings.alpha == 1 else "")],
        ["positions", f"`{settings.position}`: {POSITIONS[settings.position]}"],
        ["layers", layers],
        ["heads of those layers", _heads(settings)],
        ["context it starts from", "tokens " + _whole(settings.train_length)],
        ["paper", row.paper],
        ["written by", f"hf-sparse-attention {settings.version}"],
    ]
    return tables.markdown(["attention", ""], rows)


def _heads(settings: SparseAttentionConfig) -> str:
    if isinstance(settings.heads, dict):
        words = [f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in settings.heads.items()]
        return "; ".join([*words, "all in the other layers"])
    if settings.heads == "all":
        return "all"
    return ", ".join(map(str, settings.heads)) + "; the others keep the dense model's softmax"


def _training(evidence: Evidence) -> str:
    summary = evidence.summary
    if summary is None:
        return f"The numbers of the training are {MISSING}: there is no training summary."
    options = summary.get("options") or {}
    rows = [
        ["base model", _base_name(evidence)],
        ["steps", _whole(summary.get("steps"))],
        ["tokens", _whole(summary.get("tokens"))],
        ["passes over the data", _number(summary.get("epochs"), "{:.2f}")],
        ["tokens in a block", _whole(summary.get("block_size"))],
        ["blocks in a step", _whole(summary.get("blocks_per_step"))],
        ["learning rate", _number(summary.get("learning_rate"), "{:g}")],
        ["learning rate of new parameters", _number(summary.get("new_learning_rate"), "{:g}")],
        ["learning rate schedule", _schedule(options)],
        ["alpha schedule", _alpha_schedule(options, evidence.checkpoint.sparse)],
        ["optimizer", _optimizer(options)],
        ["precision", _precision(summary, options)],
        ["LoRA", _lora(options)],
        ["seed", _whole(options.get("seed"))],
        ["training data", _names(summary.get("train_data"))],
        ["held-out data", _names(summary.get("eval_data"))],
        ["training loss at the end", _number(summary.get("train_loss"), "{:.4f}")],
        ["held-out loss", _held_out(summary.get("eval_loss"), summary.get("eval_alpha"))],
        ["steps left out", _whole(summary.get("skipped_steps"))],
        ["hardware", str(summary.get("hardware") or MISSING)],
        ["time", _number(summary.get("seconds"), "{:,.1f} s")],
        ["tokens a second", _number(summary.get("tokens_per_second"), "{:,.0f}")],
        ["versions", ", ".join(f"{key} {value}" for key, value in (summary.get("versions") or {}).items()) or MISSING],
    ]  # fmt: skip
    command = summary.get("command")
    shown = f"```bash\n{without_folders(command)}\n```" if command else f"The command is {MISSING}."
    return f"{tables.markdown(['recipe', ''], rows)}\n\n{shown}"


def _schedule(options: dict) -> str:
    if options.get("schedule") is None:
        return MISSING
    text = f"{options['schedule']}, warm-up over {_number(options.get('warmup_share'), '{:.1%}')} of the steps"
    if options["schedule"] == "constant":
        return text
    return f"{text}, down to {_number(options.get('final_share'), '{:.1%}')} of the peak"


def _alpha_schedule(options: dict, settings: SparseAttentionConfig) -> str:
    schedule = options.get("alpha_schedule")
    if settings.alpha == 1:
        return "alpha is 1 throughout"
    if schedule is None:
        return MISSING
    if schedule == "none":
        return f"{settings.alpha:g} from the first step"
    share = _number(options.get("alpha_share"), "{:.0%}")
    return f"{schedule}, from 1 to {settings.alpha:g} over the first {share} of the steps"


def _optimizer(options: dict) -> str:
    beta1, beta2 = (_number(options.get(name), "{:g}") for name in ("beta1", "beta2"))
    decay, clip = (_number(options.get(name), "{:g}") for name in ("weight_decay", "clip"))
    return f"AdamW, betas {beta1} and {beta2}, weight decay {decay}, gradient norm clipped at {clip}"


def _precision(summary: dict, options: dict) -> str:
    return f"parameters {options.get('dtype') or MISSING}, mixed precision {summary.get('mixed_precision') or MISSING}"


def _lora(options: dict) -> str:
    rank = options.get("lora_rank")
    if rank is None:
        return MISSING
    return f"rank {rank}, merged" if rank else "none, all parameters were trained"


def _held_out(losses: list | None, alphas: list | None) -> str:
    if not losses:
        return MISSING
    (first, before), (last, after) = losses[0], losses[-1]
    shown = [f"{_number(before, '{:.4f}')} at step {first:,}", f"{_number(after, '{:.4f}')} at step {last:,}"]
    if alphas:
        shown = [f"{text} (alpha {alpha:g})" for text, alpha in zip(shown, (alphas[0], alphas[-1]), strict=True)]
    return ", ".join(shown)


def _names(names: list[str] | None) -> str:
    return ", ".join(f"`{local_name(name)}`" for name in names) if names else MISSING


def _results(evidence: Evidence) -> str:
    results = evidence.results
    if results is None:
        return f"The results are {MISSING}: the model was not evaluated, or its results were not found."
    lines = [f"This model is `{evidence.label}`."]
    versions = ", ".join(f"{name} {value}" for name, value in results.get("versions", {}).items())
    if versions:
        lines.append(f"Measured with {versions}.")
    blocks = ["\n".join(f"- {line.replace('*', chr(92) + '*')}" for line in [*lines, *remarks(results)])]
    blocks += [f"### {title}\n\n{tables.markdown(header, rows)}" for title, header, rows in sections(results)]
    return "\n\n".join(blocks)


def _sparsity(evidence: Evidence) -> str:
    report, settings = evidence.report, evidence.checkpoint.sparse
    if report is not None:
        numbers = report.get("mean") or {}
        windows, length = _whole(report.get("windows")), _whole(report.get("length"))
        text = _names((report.get("arguments") or {}).get("data"))
        source = f"Means over layers and heads. Windows: {windows}, each of {length} tokens; text: {text}."
    elif (evidence.summary or {}).get("attention"):
        numbers = evidence.summary["attention"]
        source = "Means over layers and heads at the end of training, on the first held-out blocks."
    else:
        return f"The sparsity figures are {MISSING}: there is no report of the model."
    softmax = MAPS[settings.map].softmax or settings.alpha == 1
    rows = [[text, _number(numbers.get(key), pattern)] for key, (text, pattern) in _SPARSITY.items()]
    note = "\n\nThis map is a softmax: no weight is exactly zero." if softmax else ""
    return f"{source}{note}\n\n{tables.markdown(['attention', ''], rows)}"


def _limits(evidence: Evidence) -> str:
    lines = []
    if evidence.summary is None and evidence.checkpoint.sparse.alpha != 1:
        lines.append("- Nothing shows that the model was trained with this attention.")
    block = (evidence.summary or {}).get("block_size")
    if block is not None:
        lines.append(f"- It was trained on blocks of {_whole(block)} tokens; longer texts are beyond its training.")
    if evidence.results is None:
        lines.append("- Nothing was measured of its quality.")
    return "\n".join(lines)


def _licence(licence: Licence) -> str:
    file = f" Its text is in `{licence.file.name}`." if licence.file is not None else ""
    if licence.name is None:
        return f"The licence is unknown: {licence.origin}. Ask the base model's makers before you use the weights."
    if licence.name == "other":
        return f"Licence without an identifier, {licence.origin}.{file}"
    return f"`{licence.name}`, {licence.origin}.{file}"


def _papers(settings: SparseAttentionConfig) -> list[str]:
    papers = [MAPS[settings.map].paper]
    if settings.position == "nape":
        papers.append(MAPS["asentmax"].paper)
    return list(dict.fromkeys(papers))


def _arxiv(settings: SparseAttentionConfig) -> list[str]:
    # The Hub links papers that are tagged like this.
    return [f"arxiv:{number}" for paper in _papers(settings) for number in _ARXIV.findall(paper)]


def _citation(settings: SparseAttentionConfig) -> str:
    return "\n".join(
        f"- {paper}" + "".join(f", <https://arxiv.org/abs/{number}>" for number in _ARXIV.findall(paper))
        for paper in _papers(settings)
    )


def _number(value: float | None, pattern: str) -> str:
    if value is None:
        return MISSING
    if not isinstance(value, (int, float)):
        raise ValueError(f"a file that the model card is made of has {value!r} where a number belongs")
    return pattern.format(value)


def _whole(value: int | None) -> str:
    return _number(value, "{:,}")
