"""What is known about a model -> its model card. Every number comes from a file that convert, train, evaluate or
report wrote; one that is not there is said to be missing. The text around them is data/model_cards/template.md."""

from __future__ import annotations

import re
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import tables
from ..config import ALIBI, LAYERS, POSITIONS, SparseAttentionConfig
from ..maps import MAPS
from ..results import mean_over_depths, remarks, sections
from . import recipe
from .content import auto_class, data_file
from .evidence import HUB_ID, Evidence, Licence
from .recipe import MISSING, names_of, number, whole

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
        status=recipe.status(evidence, _base_name(evidence)),
        auto_class=auto_class(evidence.checkpoint),
        location=repo_id or f"path/to/{name}",
        revision=f', revision="{revision}"' if revision else "",
        attention=_attention(evidence),
        training=recipe.training(evidence, _base_name(evidence)),
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
    return _perplexities(results, own) + _exact_matches(results, own)


def _drawn(results: dict) -> dict:
    """What a limited evaluation says of every number: a sample of another size or seed gives others."""
    arguments = results["arguments"]
    return {"limit": arguments["limit"], "seed": arguments["seed"]} if arguments["limit"] else {}


def _perplexities(results: dict, cells: list[dict]) -> list[EvalResult]:
    names = results["data"]["names"]
    dataset = names[0] if len(names) == 1 and HUB_ID.fullmatch(names[0]) else "text"
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=dataset,
            dataset_name=", ".join(names),
            dataset_args={
                "documents": results["data"]["documents"], "sha256": results["data"]["sha256"], **_drawn(results),
            },
            metric_type="perplexity",
            metric_name=f"perplexity, windows of {cell['length']} tokens"
            + (f" (limited to {cell['windows']} windows)" if _drawn(results) else ""),
            metric_value=cell["perplexity"],
            metric_args={"windows": cell["windows"], "tokens": cell["tokens"]},
        )
        for cell in cells
        if cell["task"] == "perplexity" and cell.get("perplexity") is not None
    ]  # fmt: skip


def _exact_matches(results: dict, cells: list[dict]) -> list[EvalResult]:
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
            dataset_args=_drawn(results) or None,
            metric_type="exact_match",
            metric_name=f"exact match at {length} tokens"
            + (", mean over depths" if len(group) > 1 else "")
            + (f" (limited to {sum(cell['samples'] for cell in group)} samples)" if _drawn(results) else ""),
            metric_value=mean_over_depths(group)["exact_match"],
            metric_args={
                "samples": sum(cell["samples"] for cell in group),
                **({"depths": [cell["depth"] for cell in group]} if group[0].get("depth") is not None else {}),
            },
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


def _attention(evidence: Evidence) -> str:
    settings = evidence.checkpoint.sparse
    row = MAPS[settings.map]
    layers = LAYERS[settings.layers] if isinstance(settings.layers, str) else ", ".join(map(str, settings.layers))
    rows = [
        ["map", f"`{row.name}`"],
        ["weights", f"`{row.formula}`"],
        ["alpha of this model", f"{settings.alpha:g}" + (" (softmax)" if settings.alpha == 1 else "")],
        ["positions", f"`{settings.position}`: {_positions(evidence)}"],
        ["layers", layers],
        ["heads of those layers", _heads(settings)],
        ["tokens in a training context, for its start", whole(settings.train_length)],
        ["paper", row.paper],
        ["written by", f"hf-sparse-attention {settings.version}"],
    ]
    return tables.markdown(["attention", ""], rows)


def _positions(evidence: Evidence) -> str:
    """What the position scheme is; of rotary positions that are not the plain ones of their family, their numbers."""
    config, position = evidence.checkpoint.config, evidence.checkpoint.sparse.position
    rope = getattr(config, "rope_parameters", None)
    if position != "rope" or not isinstance(rope, dict) or "rope_theta" not in rope:
        return POSITIONS[position]
    parts, kind, theta = [], rope.get("rope_type", "default"), number(rope["rope_theta"], "{:,.12g}")
    if kind == "yarn":
        parts.append(
            f"stretched {number(rope.get('factor'), '{:g}')} times by YaRN from "
            f"{whole(rope.get('original_max_position_embeddings'))} to {whole(config.max_position_embeddings)} tokens"
        )
    elif kind != "default":
        factor = f", factor {number(rope['factor'], '{:g}')}" if "factor" in rope else ""
        parts.append(f"rescaled as `{kind}`{factor}")
    records = [evidence.conversion or {}]
    records += [recipe.options_of(stage) for stage in recipe.stages_of(evidence.summary or {})]
    if any(record.get("rope_theta") is not None for record in records):
        parts.append(f"theta changed to {theta}")
    elif rope["rope_theta"] != getattr(type(config), "default_theta", None):
        # Nothing in the weights' folder says whose a theta is that a model was converted with before it was trained.
        parts.append(f"theta {theta}")
    return ", ".join(["rotary positions", *parts]) if parts else POSITIONS[position]


def _heads(settings: SparseAttentionConfig) -> str:
    if isinstance(settings.heads, dict):
        words = [f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in settings.heads.items()]
        return "; ".join([*words, "all in the other layers"])
    if settings.heads == "all":
        return "all"
    return ", ".join(map(str, settings.heads)) + "; the others keep the dense model's softmax"


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
        windows, length = whole(report.get("windows")), whole(report.get("length"))
        text = names_of((report.get("arguments") or {}).get("data"))
        source = f"Means over layers and heads. Windows: {windows}, each of {length} tokens; text: {text}."
    elif (evidence.summary or {}).get("attention"):
        numbers = evidence.summary["attention"]
        # Without a text to evaluate on, `train` looks at what it trains on.
        kind = "training" if evidence.summary.get("eval_data") == [] else "held-out"
        source = f"Means over layers and heads at the end of training, on the first {kind} blocks."
    else:
        return f"The sparsity figures are {MISSING}: there is no report of the model."
    softmax = MAPS[settings.map].softmax or settings.alpha == 1
    rows = [[text, number(numbers.get(key), pattern)] for key, (text, pattern) in _SPARSITY.items()]
    note = "\n\nThis map is a softmax: no weight is exactly zero." if softmax else ""
    return f"{source}{note}\n\n{tables.markdown(['attention', ''], rows)}"


def _limits(evidence: Evidence) -> str:
    lines = []
    if evidence.summary is None and evidence.checkpoint.sparse.alpha != 1:
        lines.append("- Nothing shows that the model was trained with this attention.")
    block = (evidence.summary or {}).get("block_size")
    if block is not None:
        lines.append(f"- It was trained on blocks of {whole(block)} tokens; longer texts are beyond its training.")
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
    if settings.position in ALIBI:
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
