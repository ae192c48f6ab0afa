"""Our needles for lm-eval: what the YAML files beside this one call. `metadata` of lm-eval comes in as keywords."""

from functools import partial

from hf_sparse_attention.tasks.harness import needle_documents


def _documents(
    name, *, max_seq_lengths=(1024,), tokenizer=None, pretrained=None, model=None, samples=100, seed=0, **_
):
    source = tokenizer or pretrained or model
    if not isinstance(source, str):
        raise ValueError('needles are counted in tokens: name the tokenizer with --metadata \'{"tokenizer": "..."}\'')
    return needle_documents(name, tokenizer=source, max_seq_lengths=list(max_seq_lengths), samples=samples, seed=seed)


passkey = partial(_documents, "passkey")
needle = partial(_documents, "needle")
multi_needle = partial(_documents, "multi_needle")
multi_query = partial(_documents, "multi_query")
variable_tracking = partial(_documents, "variable_tracking")


def process_results(doc, results):
    """Right if the text begins with the answer, white space aside."""
    said = " ".join(results[0].split())
    return {"exact_match": float(said.startswith(doc["outputs"]))}
