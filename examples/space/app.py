"""A Gradio app that generates text and shows where the attention looked: python app.py [--model folder-or-hub-id]"""

from __future__ import annotations

import argparse
import html
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_sparse_attention
from hf_sparse_attention.checkpoint import examine, load, load_tokenizer

EMBEDDED = Path(hf_sparse_attention.__file__).parent / "data" / "stories260K"
# Tokens of prompt and text together: the weights of all layers are held while one is drawn.
LONGEST = 160
CELL = 7
# A click on a token says which one.
CHOOSE = """element.addEventListener('click', event => {
  const token = event.target.closest('[data-position]');
  if (token) trigger('select', {position: Number(token.dataset.position)});
})"""


class Viewer:
    """A model and its tokenizer; text and pictures of its attention leave. Nothing of a visitor's is kept here.

    Args:
        path: folder or Hub id of a sparse model; None converts the embedded dense one.
    """

    def __init__(self, path: str | None = None):
        if path:
            checkpoint = examine(path)
            if checkpoint.sparse is None:
                raise ValueError(f"{path} is dense: convert and train it first")
            self.model, self.tokenizer = load(checkpoint), load_tokenizer(checkpoint.source.folder)
            self.trained = not checkpoint.source.is_untrained
            name = Path(path).name if Path(path).exists() else path
        else:
            self.model = AutoModelForCausalLM.from_pretrained(EMBEDDED, attn_implementation="asentmax").eval()
            self.tokenizer, self.trained = load_tokenizer(EMBEDDED), False
            name = "stories260K, converted as this app started"
        settings = self.model.config.sparse_attention
        self.target = settings["alpha"]
        self.start = self.target if self.trained else 1.0
        self.notice = f"**{name}**: {settings['map']}, alpha {self.target:g}. " + (
            "Nothing marks it as untrained, so it starts at the alpha it was saved with."
            if self.trained
            else "**It was never trained with sparse attention.** At alpha 1 it is the dense model and every key has "
            "weight; above that there are exact zeros and worse text, often nonsense."
        )
        self.layers, self.heads = self.model.config.num_hidden_layers, self.model.config.num_attention_heads

    def generate(self, prompt: str, new_tokens: float, alpha: float) -> list[int]:
        """The tokens of the prompt and of what the model writes behind it.

        Raises:
            ValueError: for a prompt without tokens, or with too many.
        """
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not prompt.strip() or ids.shape[1] >= LONGEST:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens; write something, of at most {LONGEST - 1}")
        count = min(int(new_tokens), LONGEST - ids.shape[1])
        self._set_alpha(alpha)
        with torch.no_grad():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        return found[0].tolist()

    def weights(self, ids: list[int], layer: int, head: int, alpha: float) -> torch.Tensor:
        """The weights (queries, keys) of a head over the tokens."""
        self._set_alpha(alpha)
        with torch.no_grad():
            found = self.model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
        return found[layer][0, head].float()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def picture(self, ids: list[int], layer: int, head: int, query: int, alpha: float) -> str:
        """HTML: the tokens, shaded by the weight a query gives them, and the weights of all queries."""
        weights = self.weights(ids, layer, head, alpha)
        query = min(query, len(ids) - 1)
        row = weights[query, : query + 1]
        words = []
        for position, token in enumerate(ids):
            weight = float(row[position]) if position <= query else 0.0
            style = "padding:1px 2px;border:1px solid transparent;border-radius:3px;cursor:pointer;"
            if weight > 0:
                style += f"border-color:#D55E00;background:rgba(213,94,0,{0.1 + 0.7 * weight:.3f});"
            if position == query:
                style += "font-weight:bold;text-decoration:underline;"
            elif position > query:
                style += "opacity:.4;"
            word = html.escape(self.tokenizer.decode([token])).replace("\n", "\\n") or "&nbsp;"
            words.append(
                f'<span style="{style}" title="{weight:.4f}" data-weight="{weight:.6g}" data-position="{position}">'
                f"{word}</span>"
            )
        seen = int((row > 0).sum())
        said = f"Layer {layer}, head {head}: the underlined token gives weight to {seen} of the {query + 1} tokens it"
        said += f" sees; {query + 1 - seen} weigh exactly 0."
        return f'<p>{said}</p><div style="line-height:1.9">{" ".join(words)}</div>{_matrix(weights, query)}'

    def _set_alpha(self, alpha: float) -> None:
        if alpha != self.model.config.sparse_attention["alpha"]:
            hf_sparse_attention.set_alpha(self.model, alpha)


def _matrix(weights: torch.Tensor, query: int) -> str:
    """SVG: a cell for each weight above zero; a zero is nothing at all."""
    side = len(weights)
    cells = [
        f'<rect x="{key}" y="{row}" width="1" height="1" fill-opacity="{0.1 + 0.9 * weights[row, key].item():.2f}"/>'
        for row, key in weights.nonzero().tolist()
    ]
    return (
        f'<svg viewBox="-0.5 -0.5 {side + 1} {side + 1}" style="width:min(100%,{side * CELL + 60}px);margin-top:1em" '
        f'role="img" aria-label="attention weights, a row per query"><g fill="#0072B2" stroke="#0072B2" '
        f'stroke-width="0.08">{"".join(cells)}</g><path d="M0 0L{side} {side}V{side}H0Z" fill="none" stroke="#888" '
        f'stroke-width="0.1"/><rect x="0" y="{query}" width="{query + 1}" height="1" fill="none" stroke="#D55E00" '
        f'stroke-width="0.25"/></svg>'
    )


def build(viewer: Viewer):
    """The app, not yet started."""
    import gradio as gr

    with gr.Blocks(title="Where sparse attention looks", analytics_enabled=False) as app:
        gr.Markdown(f"# Where sparse attention looks\n\n{viewer.notice}")
        tokens = gr.State([])
        prompt = gr.Textbox("Once upon a time", label="prompt")
        with gr.Row():
            count = gr.Slider(1, LONGEST - 1, 40, step=1, label="new tokens")
            # A map that is always a softmax has one alpha.
            highest = max(viewer.target, 1.01)
            alpha = gr.Slider(
                1, highest, viewer.start, step=0.01, label="alpha (1 is softmax)", interactive=viewer.target > 1
            )
        write = gr.Button("Write", variant="primary")
        text = gr.Textbox(label="text", interactive=False)
        with gr.Row():
            layer = gr.Slider(0, viewer.layers - 1, 0, step=1, label="layer")
            head = gr.Slider(0, viewer.heads - 1, 0, step=1, label="head")
            query = gr.Slider(1, LONGEST, LONGEST, step=1, label="token that looks (or click one)")
        view = gr.HTML(js_on_load=CHOOSE)

        def draw(ids, layer, head, query, alpha):
            return viewer.picture(ids, int(layer), int(head), int(query) - 1, float(alpha)) if ids else ""

        def choose(event):
            return event.position + 1

        # Gradio hands over what was clicked where the type says so, which as a word it could not look up here.
        choose.__annotations__["event"] = gr.EventData

        def run(prompt, count, layer, head, query, alpha):
            try:
                ids = viewer.generate(prompt, count, float(alpha))
            except ValueError as error:
                raise gr.Error(str(error)) from error
            return ids, viewer.text(ids), draw(ids, layer, head, query, alpha)

        # One call at a time: alpha is a setting of the one model that all visitors share.
        shared = {"concurrency_id": "model", "concurrency_limit": 1}
        write.click(run, [prompt, count, layer, head, query, alpha], [tokens, text, view], api_name="write", **shared)
        # The slider's change draws.
        view.select(choose, None, query, api_name=False)
        for control in (layer, head, query, alpha):
            control.change(
                draw, [tokens, layer, head, query, alpha], view, api_name=False, trigger_mode="always_last", **shared
            )
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("SPARSE_MODEL"), help="folder or Hub id of a sparse model")
    build(Viewer(parser.parse_args().model)).launch()
