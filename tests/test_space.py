"""The Gradio app of examples/space: what it shows is what the model computes, and it can be started and clicked."""

import gc
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from browser import Browser, chromium

SPACE = Path(__file__).parent.parent / "examples" / "space"
specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
space = importlib.util.module_from_spec(specification)
specification.loader.exec_module(space)


@pytest.fixture(scope="module")
def viewer():
    return space.Viewer()


def test_an_untrained_model_says_so_and_starts_at_softmax(viewer):
    assert not viewer.trained and viewer.start == 1.0 and viewer.target == 1.5
    assert "never trained" in viewer.notice


def test_a_converted_folder_is_not_taken_for_a_trained_one(tmp_path):
    from hf_sparse_attention.convert import ConvertArguments, convert_model

    convert_model(ConvertArguments(model=str(space.EMBEDDED), output=str(tmp_path / "sparse")))
    assert not space.Viewer(str(tmp_path / "sparse")).trained
    with pytest.raises(ValueError, match="is dense"):
        space.Viewer(str(space.EMBEDDED))


def test_zeros_are_nothing_and_weights_are_outlined(viewer):
    ids = viewer.generate("Once upon a time", 20, 1.0)
    weights = viewer.weights(ids, 1, 2, 1.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(ids)))
    page = viewer.picture(ids, 1, 2, len(ids) - 1, 1.5)
    shown = [float(value) for value in re.findall(r'data-weight="([^"]+)"', page)]
    torch.testing.assert_close(torch.tensor(shown), weights[-1], atol=1e-5, rtol=1e-4)
    assert page.count("border-color") == int((weights[-1] > 0).sum()) < len(ids)
    # One cell for each weight above zero, and the frame of the chosen query.
    assert page.count("<rect") == int((weights > 0).sum()) + 1
    assert viewer.picture(ids, 1, 2, len(ids) - 1, 1.0).count("border-color") == len(ids)


def test_an_early_query_sees_nothing_after_it(viewer):
    ids = viewer.generate("Once upon a time", 10, 1.0)
    page = viewer.picture(ids, 0, 0, 2, 1.0)
    shown = [float(value) for value in re.findall(r'data-weight="([^"]+)"', page)]
    assert all(value > 0 for value in shown[:3]) and not any(shown[3:])


def test_prompts_that_cannot_be_shown_are_refused(viewer):
    for prompt in ("", "  ", "cat " * 500):
        with pytest.raises(ValueError, match="the prompt has"):
            viewer.generate(prompt, 5, 1.0)


def click_a_token(address: str) -> None:
    """In a browser: writes, and clicks the fifth token, which then is the one that looks."""
    browser = Browser()
    try:
        browser.call("Page.navigate", url=address)
        browser.wait("!!document.querySelector('button.primary')?.offsetParent")
        browser.click("button.primary")
        browser.wait("document.querySelectorAll('[data-position]').length > 40")
        last = browser.evaluate("document.querySelectorAll('[data-position]').length - 1")
        chosen = (
            "[...document.querySelectorAll('[data-position]')].findIndex(token => token.style.fontWeight == 'bold')"
        )
        assert browser.evaluate(chosen) == last
        browser.click("[data-position='4']")
        browser.wait(f"{chosen} == 4")
        assert "of the 5 tokens it sees" in browser.evaluate("document.body.innerText")
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_app_starts_and_answers_a_click(viewer):
    pytest.importorskip("gradio", reason="gradio is not installed")
    client_of = pytest.importorskip("gradio_client", reason="gradio_client is not installed").Client
    app = space.build(viewer)
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        client = client_of(address, verbose=False)
        dense, sparse = (
            client.predict("Once upon a time", 12, 1, 2, 160, alpha, api_name="/write") for alpha in (1, 1.5)
        )
        assert str(dense[0]).startswith("Once upon a time")
        assert "; 0 weigh exactly 0" in str(dense[1]) and "; 0 weigh exactly 0" not in str(sparse[1])
        if chromium() is not None:
            click_a_token(address)
    finally:
        app.close()
        del app, client
        # The event loops of Gradio and its client warn when they are collected: here, where that is ignored.
        gc.collect()
