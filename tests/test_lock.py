"""A folder that is written to by one run at a time."""

import os
import signal
import subprocess
import sys

import pytest
from training_cases import home_folder, options, run, train_together

from hf_sparse_attention.lock import LOCK, sole_writer
from hf_sparse_attention.train import TrainTaskArguments, train_task

HOLD = """
import sys, time
from hf_sparse_attention.lock import sole_writer
with sole_writer(sys.argv[1]):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is writing into tmp_path / "output"."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "output")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"inside\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_writes(tmp_path, holder):
    refusal = f"another run is writing into output .*process {holder.pid} on "
    with pytest.raises(FileExistsError, match=refusal), sole_writer(tmp_path / "output"):
        pytest.fail("two were inside")
    # The refusal has left the first one's lock alone.
    with pytest.raises(FileExistsError, match="another run"), sole_writer(tmp_path / "output"):
        pytest.fail("two were inside")


def test_a_killed_run_holds_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "output" / LOCK).exists()
    with sole_writer(tmp_path / "output"):
        pass
    assert not (tmp_path / "output" / LOCK).exists()


def test_this_process_is_refused_like_another(tmp_path):
    with sole_writer(tmp_path):
        with pytest.raises(FileExistsError, match=f"process {os.getpid()} on "), sole_writer(tmp_path):
            pytest.fail("two were inside")
        assert (tmp_path / LOCK).exists()
    with sole_writer(tmp_path):
        pass


def test_nothing_is_left_of_a_block_that_wrote_nothing(tmp_path):
    with pytest.raises(ValueError, match="refused"), sole_writer(tmp_path / "deep" / "output"):
        raise ValueError("refused")
    assert not (tmp_path / "deep").exists()
    with sole_writer(tmp_path / "deep" / "output"):
        (tmp_path / "deep" / "output" / "file").touch()
    assert os.listdir(tmp_path / "deep" / "output") == ["file"]


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "output").touch()
    with pytest.raises(FileExistsError, match="is a file, not a folder"), sole_writer(tmp_path / "output"):
        pytest.fail("was inside")


def test_where_no_lock_can_be_had_a_warning_says_why(tmp_path, monkeypatch, caplog):
    def acquire(self, **_):
        raise OSError(37, "No locks available")

    # Such as the file of another user's run, which is not this one's to remove.
    (tmp_path / LOCK).touch()
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with sole_writer(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
    assert "No locks available): nothing keeps another run from writing there" in caplog.text


def test_small_models_are_not_trained_where_others_are(tmp_path, holder):
    before = sorted(os.listdir(tmp_path / "output"))
    arguments = TrainTaskArguments(
        task="copy", steps=2, warmup_steps=1, output=str(tmp_path / "output"), device="cpu", resume="auto"
    )
    with pytest.raises(FileExistsError, match="another run"):
        train_task(arguments)
    assert sorted(os.listdir(tmp_path / "output")) == before


def test_all_processes_of_a_run_are_refused(tmp_path, holder):
    """The one that asks for the lock does not leave the others waiting for it."""
    values = options(home_folder(tmp_path), output=str(tmp_path / "output"))
    assert train_together(values, tmp_path / "log") == [1, 1]
    for rank in range(2):
        assert "another run is writing into output" in (tmp_path / f"log-{rank}").read_text()


def test_a_model_is_not_trained_where_another_is(tmp_path, holder):
    """Also to go on is refused: two would write the same checkpoints."""
    before = sorted(os.listdir(tmp_path / "output"))
    home_folder(tmp_path)
    with pytest.raises(FileExistsError, match="another run"):
        run(tmp_path, output=str(tmp_path / "output"), resume="auto")
    assert sorted(os.listdir(tmp_path / "output")) == before
