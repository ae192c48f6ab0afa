"""Converting a dense folder: what is kept, what is new, and everything that must fail without leaving a trace."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_cases import dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedModel

import hf_sparse_attention as hsa
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.models import new_parameter_names


@pytest.fixture
def dense(tmp_path):
    return dense_folder(tmp_path / "dense")


def convert(dense, output, **changes):
    return convert_model(ConvertArguments(model=str(dense), output=str(output), **changes))


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_nothing_left(parent, *allowed):
    assert sorted(path.name for path in parent.iterdir()) == sorted(allowed)


@pytest.mark.parametrize("name", list(hsa.MAPS))
def test_weights_are_kept_and_new_ones_start_at_zero(tmp_path, dense, name, capsys):
    output = convert(dense, tmp_path / "sparse", map=name)
    before, after = tensors(dense), tensors(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    new = set(new_parameter_names(model))
    assert type(model).__name__ == "SparseLlamaForCausalLM"
    assert set(after) == set(before) | new
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(after[key].count_nonzero() == 0 for key in new)
    assert f"kept: {len(before)}" in capsys.readouterr().out
    assert_nothing_left(tmp_path, "dense", "sparse")


def test_alpha_one_is_the_dense_model(tmp_path, dense):
    output = convert(dense, tmp_path / "sparse", alpha=1.0)
    tokens = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(dense)(tokens).logits
        got = AutoModelForCausalLM.from_pretrained(output)(tokens).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_companions_are_copied_exactly(tmp_path, dense):
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "README.md").write_text("the dense model's card")
    output = convert(dense, tmp_path / "sparse")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.jinja",
    ):
        assert (output / name).read_bytes() == (dense / name).read_bytes()
    assert not (output / "README.md").exists()
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}"


def test_dtype_and_shards_are_kept(tmp_path):
    dense = dense_folder(tmp_path / "dense", dtype=torch.bfloat16, shard="30KB", num_hidden_layers=4)
    shards = len(list(dense.glob("*.safetensors")))
    assert shards > 2
    output = convert(dense, tmp_path / "sparse")
    assert abs(len(list(output.glob("*.safetensors"))) - shards) <= 1
    assert {tensor.dtype for tensor in tensors(output).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    single = convert(dense, tmp_path / "single", dtype="float32", max_shard_size="1GB")
    assert {tensor.dtype for tensor in tensors(single).values()} == {torch.float32}
    assert [file.name for file in single.glob("*.safetensors")] == ["model.safetensors"]


def test_options_reach_the_config(tmp_path, dense):
    output = convert(
        dense, tmp_path / "sparse", map="entmax", alpha=1.25, position="nape", layers="1", train_length=48
    )
    block = json.loads((output / "config.json").read_text())["sparse_attention"]
    expected = {"map": "entmax", "alpha": 1.25, "position": "nape", "layers": [1], "train_length": 48}
    assert {key: block[key] for key in expected} == expected


def test_second_run_changes_nothing(tmp_path, dense, capsys):
    output = convert(dense, tmp_path / "sparse")
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in output.iterdir()}
    assert convert(dense, output) == output
    assert "nothing to do" in capsys.readouterr().out
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in output.iterdir()} == before


def test_another_conversion_needs_overwrite(tmp_path, dense):
    output = convert(dense, tmp_path / "sparse")
    with pytest.raises(FileExistsError, match=r"another conversion \(different: sparse_attention\).*--overwrite"):
        convert(dense, output, map="entmax")
    dense_folder(dense, seed=1)
    with pytest.raises(FileExistsError, match="different: source_sha256"):
        convert(dense, output)
    (output / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError):
        convert(dense, output)
    convert(dense, output, map="entmax", overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(output).config.sparse_attention["map"] == "entmax"
    assert_nothing_left(tmp_path, "dense", "sparse")


def test_output_that_is_something_else(tmp_path, dense):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is no conversion"):
            convert(dense, other, overwrite=overwrite)
        with pytest.raises(FileExistsError, match="is a file"):
            convert(dense, tmp_path / "file", overwrite=overwrite)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_source_is_never_written_to(tmp_path, dense):
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    (tmp_path / "link").symlink_to(dense)
    for output in (dense, dense / "sparse", tmp_path / "link", tmp_path):
        with pytest.raises((ValueError, FileExistsError), match=r"never written|no conversion"):
            convert(dense, output, overwrite=True)
    assert {file.name: file.read_bytes() for file in dense.iterdir()} == before


def _truncate(dense):
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(dense):
    (dense / "model.safetensors").write_bytes(b"not a checkpoint")


def _no_weights(dense):
    (dense / "model.safetensors").unlink()


def _missing_shard(dense):
    dense_folder(dense, shard="30KB")
    (dense / "model.safetensors").unlink(missing_ok=True)
    sorted(dense.glob("model-*.safetensors"))[0].unlink()


def _change(dense, edit):
    values = load_file(dense / "model.safetensors")
    edit(values)
    save_file(values, dense / "model.safetensors", metadata={"format": "pt"})


def _extra_tensor(dense):
    _change(dense, lambda values: values.update({"model.layers.0.surprise": torch.zeros(2)}))


def _missing_tensor(dense):
    _change(dense, lambda values: values.pop("model.norm.weight"))


def _wrong_shape(dense):
    _change(dense, lambda values: values.update({"model.norm.weight": torch.zeros(7)}))


def _encoder(dense):
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    shutil.rmtree(dense)
    BertForMaskedLM(config).save_pretrained(dense)


def _broken_config(dense):
    (dense / "config.json").write_text("{")


def _no_config(dense):
    (dense / "config.json").unlink()


def _small_vocabulary(dense):
    dense_folder(dense, vocab_size=400)


def _broken_tokenizer(dense):
    (dense / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, OSError, "model.safetensors is corrupt or cut off"),
        (_garbage, OSError, "model.safetensors is corrupt or cut off"),
        (_no_weights, FileNotFoundError, "has no weights"),
        (_missing_shard, FileNotFoundError, "lacks model-00001-of-"),
        (_extra_tensor, ValueError, "unexpected: 1  model.layers.0.surprise"),
        (_missing_tensor, ValueError, "missing: 1  model.norm.weight"),
        (_wrong_shape, ValueError, "do not fit its config"),
        (_encoder, ValueError, "'bert' is not a supported decoder"),
        (_broken_config, ValueError, "config.json"),
        (_no_config, FileNotFoundError, "no config.json"),
        (_small_vocabulary, ValueError, "tokenizer does not fit"),
        (_broken_tokenizer, OSError, "tokenizer in .* cannot be loaded"),
    ],
)
def test_bad_models(tmp_path, dense, damage, error, message):
    damage(dense)
    with pytest.raises(error, match=message):
        convert(dense, tmp_path / "sparse")
    assert_nothing_left(tmp_path, "dense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map": "sparsemin"}, "'sparsemin'; choose one of entmax"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"map": "ssmax", "alpha": 1.5}, "ssmax takes 1 <= alpha <= 1"),
        ({"position": "alibi"}, "'alibi'; choose one of rope"),
        ({"layers": "some"}, "layers is 'some'; choose"),
        ({"layers": "0,7"}, r"names \[7\], but the model has layers 0 to 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"revision": "main"}, "local folder, which has none"),
        ({"train_length": 0}, "train_length is 0"),
    ],
)
def test_bad_options(tmp_path, dense, changes, message):
    with pytest.raises(ValueError, match=message):
        convert(dense, tmp_path / "sparse", **changes)
    assert_nothing_left(tmp_path, "dense")


def test_already_sparse(tmp_path, dense):
    sparse = convert(dense, tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"already sparse \(sparse_llama, map asentmax\)"):
        convert(sparse, tmp_path / "again")
    assert_nothing_left(tmp_path, "dense", "sparse")


def test_no_such_model(tmp_path):
    for name in (str(tmp_path / "nowhere"), "no such name"):
        with pytest.raises(OSError, match="no model"):
            convert(name, tmp_path / "sparse")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        convert(tmp_path / "file", tmp_path / "sparse")


def test_interrupted_download(tmp_path, dense, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append(options)
        if "*.safetensors*" in options["allow_patterns"]:
            raise ConnectionError("peer closed connection")
        return str(dense)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        OSError,
        match="owner/dense is no folder here, and could not be fetched completely .*peer closed.*run the command",
    ):
        convert("owner/dense", tmp_path / "sparse")
    assert_nothing_left(tmp_path, "dense")
    assert len(calls) == 2

    snapshot = tmp_path / "0123abc"
    shutil.copytree(dense, snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(snapshot))
    output = convert("owner/dense", tmp_path / "sparse", revision="main")
    record = json.loads((output / "conversion.json").read_text())
    assert (record["model"], record["revision"], record["commit"]) == ("owner/dense", "main", "0123abc")


def test_unsupported_model_is_refused_before_its_weights_are_fetched(tmp_path, dense, monkeypatch):
    _encoder(dense)

    def download(name, allow_patterns, **options):
        assert allow_patterns == ["config.json"]
        return str(dense)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match="not a supported decoder"):
        convert("owner/bert", tmp_path / "sparse")


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk(tmp_path, dense, monkeypatch, overwrite):
    if overwrite:
        convert(dense, tmp_path / "sparse", map="entmax")
    save = PreTrainedModel.save_pretrained

    def save_some(self, folder, **options):
        save(self, folder, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_some)
    with pytest.raises(OSError, match="sparse could not be written: the disk is full") as caught:
        convert(dense, tmp_path / "sparse", overwrite=overwrite)
    assert caught.value.errno == errno.ENOSPC
    assert_nothing_left(tmp_path, "dense", *(["sparse"] if overwrite else []))
    if overwrite:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.sparse_attention["map"] == "entmax"


def test_weights_that_change_on_the_way_are_noticed(tmp_path, dense, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def save_other(self, folder, **options):
        with torch.no_grad():
            self.model.norm.weight[0] += 1
        save(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_other)
    with pytest.raises(RuntimeError, match=r"model.norm.weight was not written as it was read"):
        convert(dense, tmp_path / "sparse")
    assert_nothing_left(tmp_path, "dense")
