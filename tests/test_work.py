"""Units of work: what resume, sharing and equal bytes rest on."""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import fresh
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from edc_hub import disk, launch, work
from edc_hub.errors import InputError
from edc_hub.work import Progress, Store, Unit


def units(count, mark="f" * 16):
    return [Unit("stage", f"unit-{index}", mark) for index in range(count)]


def draw(unit, generator, progress):
    return {"x": torch.rand(5, generator=generator)}, {"unit": unit.name}


def digest(store, unit):
    return hashlib.sha256(store.path(unit).read_bytes()).hexdigest()


def test_a_generator_depends_on_seed_stage_and_unit_only():
    first = torch.rand(3, generator=work.generator(1, "a", "u"))
    assert torch.equal(first, torch.rand(3, generator=work.generator(1, "a", "u")))
    for other in [(2, "a", "u"), (1, "b", "u"), (1, "a", "v")]:
        assert not torch.equal(first, torch.rand(3, generator=work.generator(*other)))


def test_a_fingerprint_changes_with_any_input_and_with_the_version_but_not_with_key_order():
    base = work.fingerprint("s", 1, a=1, b=[1.5, None])
    assert base == work.fingerprint("s", 1, b=[1.5, None], a=1)
    others = [work.fingerprint("s", 2, a=1, b=[1.5, None]), work.fingerprint("s", 1, a=2, b=[1.5, None])]
    others += [work.fingerprint("t", 1, a=1, b=[1.5, None]), work.fingerprint("s", 1, a=1, b=[1.5, 0])]
    assert len({base, *others}) == 5


def test_finished_units_are_found_and_not_made_again(session):
    made = []

    def make(unit, generator, progress):
        made.append(unit.name)
        return draw(unit, generator, progress)

    assert work.run(units(3), make, session, seed=0, label="x") == 3
    before = [digest(session.store, unit) for unit in units(3)]
    assert work.run(units(5), make, session, seed=0, label="x") == 2
    assert made == [f"unit-{index}" for index in range(5)]
    assert before == [digest(session.store, unit) for unit in units(3)]


def test_changed_work_is_another_file_and_overwrites_nothing(session):
    work.run(units(1), draw, session, seed=0, label="x")
    work.run(units(1, mark="0" * 16), draw, session, seed=0, label="x")
    assert len(list((session.store.root / "stage").iterdir())) == 2


def test_a_unit_reads_back_with_its_facts(session):
    work.run(units(1), draw, session, seed=3, label="x")
    (unit,) = units(1)
    expected = torch.rand(5, generator=work.generator(3, "stage", "unit-0"))
    assert torch.equal(session.store.load(unit)["x"], expected)
    assert session.store.facts(unit) == {"unit": "unit-0"}


def test_a_damaged_file_is_named_with_what_to_do(session):
    work.run(units(1), draw, session, seed=0, label="x")
    path = session.store.path(units(1)[0])
    path.write_bytes(path.read_bytes()[:-1])
    for read in (session.store.load, session.store.facts, lambda _: Progress(path, 0.0).load()):
        with pytest.raises(InputError, match=f"{path}: no whole file .*; remove it and give the same command again"):
            read(units(1)[0])


def test_a_failed_write_leaves_no_file_behind(tmp_path):
    def write(path):
        path.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        disk.write_atomically(tmp_path / "a" / "file", write)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(("word", "shown"), [("0", "lines"), ("1", "none")])
def test_progress_is_turned_off_as_the_hub_s_client_reads_it(word, shown):
    program = "from edc_hub import launch; print(launch._progress())"
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": word}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == f"{shown}\n", done.stderr


def test_a_unit_that_saved_its_progress_goes_on_from_there(session):
    (unit,) = units(1)
    steps = []

    def make(unit, generator, progress, stop=None):
        saved = progress.load()
        total, start = (saved["total"], int(saved["step"])) if saved else (torch.zeros(2), 0)
        if saved:
            generator.set_state(saved["generator"])
        for step in range(start, 6):
            if step == stop:
                raise KeyboardInterrupt
            steps.append(step)
            total = total + torch.rand(2, generator=generator)
            progress.save(
                lambda total=total, step=step: {
                    "total": total, "step": torch.tensor(step + 1), "generator": generator.get_state(),
                }
            )  # fmt: skip
        return {"total": total}, {}

    with pytest.raises(KeyboardInterrupt):
        work.run([unit], lambda *a: make(*a, stop=4), session, seed=0, label="x")
    work.run([unit], make, session, seed=0, label="x")
    assert steps == [0, 1, 2, 3, 4, 5]
    generator = work.generator(0, *unit[:2])
    assert torch.equal(session.store.load(unit)["total"], sum(torch.rand(2, generator=generator) for _ in range(6)))
    assert [path.suffix for path in (session.store.root / "stage").iterdir()] == [".safetensors"]


def test_a_log_has_a_line_a_minute_of_what_takes_longer_and_nothing_of_the_rest(session, monkeypatch, capsys):
    logged = replace(session, progress="lines")
    clock = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])  # by which tqdm decides when to display
    for seconds in (10, 25):  # four steps take 40 and 100 seconds
        with logged.bar(total=4, desc="resnet18", unit="step", leave=False) as bar:
            for _ in range(4):
                clock[0] += seconds
                bar.set_postfix(loss="0.5", refresh=False)
                bar.update()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\r" not in said
    assert said.startswith("resnet18:  75%") and "3/4" in said and "loss=0.5" in said
    with replace(session, progress="none").bar(range(3)) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_progress_is_saved_only_when_it_is_due(tmp_path):
    progress = Progress(tmp_path / "p", seconds=1000)
    progress.save(lambda: pytest.fail("not due"))
    assert progress.load() is None


def test_a_resumed_unit_tells_the_time_of_the_killed_run_too(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])
    killed = Progress(tmp_path / "p", seconds=0)
    clock[0] = 40.0
    killed.save(lambda: {"x": torch.zeros(1)})
    clock[0] = 1000.0
    resumed = Progress(tmp_path / "p", seconds=0)
    assert resumed.load() is not None
    clock[0] = 1002.0
    assert resumed.elapsed == 42.0


def test_temporary_files_of_dead_processes_are_swept_and_those_of_living_ones_kept(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    mine = disk.temporary(tmp_path / "s" / "a.safetensors")
    mine.parent.mkdir()
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{child.pid}."))
    foreign = mine.with_name(f".a.safetensors.rack.{socket.gethostname()}.{child.pid}.tmp")
    other = mine.with_name(f".a.safetensors.{socket.gethostname()}.part.tmp")  # of another program
    for path in (mine, dead, foreign, other):
        path.touch()
    disk.sweep(tmp_path)
    assert mine.exists() and foreign.exists() and other.exists() and not dead.exists()


HOLD = """
import sys, time
from pathlib import Path
from edc_hub import disk
with disk.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_that_cannot_be_written_is_refused_with_one_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a part of the path is a file; choose another output_dir$") as refused:
        with disk.lock(tmp_path / "file" / "run"):
            pass
    assert str(refused.value).count("choose another") == 1


def test_a_second_writer_is_refused_with_the_first_ones_name_and_a_killed_one_holds_nothing(tmp_path):
    child = fresh.start(HOLD, tmp_path, env=dict(os.environ), talks=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"output_dir: .*process {child.pid} .*choose another output_dir"):
        with disk.lock(tmp_path):
            pass
    child.kill()
    child.wait(60)
    with disk.lock(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir: .*part of the path is a file"):
        with disk.lock(tmp_path / "file" / "run"):
            pass


def test_a_full_disk_is_the_users_error_and_leaves_finished_units_alone(session):
    first, second = units(2)
    session.store.save(first, {"x": torch.zeros(4)})
    before = digest(session.store, first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="output_dir: cannot write .*larger than this disk"):
            session.store.save(second, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not session.store.has(second) and digest(session.store, first) == before


SHARD = """
import sys
import torch
from datetime import timedelta
from pathlib import Path
from accelerate import PartialState
from edc_hub import work
sys.path.insert(0, str(Path(sys.argv[2])))
from test_work import draw, units
state = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=60))
session = work.Session(work.Store(Path(sys.argv[1])), state, torch.device("cpu"), progress="none")
work.run(units(7), draw, session, seed=5, label="x")
assert all(session.store.has(unit) for unit in units(7))
state.destroy_process_group()  # as launch.session does: gloo's threads end before the interpreter
"""


def test_two_processes_make_the_files_that_one_makes(session, tmp_path):
    work.run(units(7), draw, session, seed=5, label="x")
    root = tmp_path / "two"
    done = fresh.ranks(2, SHARD, root, os.path.dirname(__file__), env=dict(os.environ), module=False)
    assert [one.returncode for one in done] == [0, 0], done
    assert [digest(Store(root), unit) for unit in units(7)] == [digest(session.store, unit) for unit in units(7)]


FAIL = """
import sys
import torch
from datetime import timedelta
from pathlib import Path
from accelerate import PartialState
from edc_hub import work
from edc_hub.errors import InputError, OtherFailed
sys.path.insert(0, str(Path(sys.argv[2])))
from test_work import draw, units
state = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=60))
session = work.Session(work.Store(Path(sys.argv[1])), state, torch.device("cpu"), progress="none")

def failing(unit, *rest):
    if unit.name == "unit-1":
        raise InputError("width: too much")
    return draw(unit, *rest)

for mark in ("1", "2"):  # the first fails on the second process, in its units; the next on the first, before them
    try:
        if (mark, state.process_index) == ("2", 0):
            raise InputError("width: too much")
        work.run(units(4, mark=mark), failing if mark == "1" else draw, session, seed=5, label="x")
        sys.exit("nobody said so")
    except InputError as error:
        session.wait(failed=error)
    except OtherFailed as error:
        assert isinstance(error.error, InputError) and str(error) == "width: too much"
        print("told", mark, state.process_index, flush=True)
work.run(units(4), draw, session, seed=5, label="x")
assert all(session.store.has(unit) for unit in units(4))
state.destroy_process_group()
"""


def test_processes_that_wait_for_one_that_fails_are_told_and_go_on_together(tmp_path):
    here = os.path.dirname(__file__)
    done = fresh.ranks(2, FAIL, tmp_path / "store", here, env=dict(os.environ), module=False)
    assert [(one.returncode, one.stdout) for one in done] == [(0, "told 1 0\n"), (0, "told 2 1\n")], done


def test_run_waits_for_nothing_when_all_is_there(session):
    work.run(units(200), draw, session, seed=0, label="x")
    start = time.perf_counter()
    assert work.run(units(200), lambda *a: pytest.fail("made again"), session, seed=0, label="x") == 0
    assert time.perf_counter() - start < 1.0


def test_the_shares_follow_what_the_first_process_sees(session, monkeypatch):
    """Another run finishes a unit between the looks of two processes: no unit may be left to nobody."""
    session.store.save(units(4)[0], {"x": torch.zeros(5)})
    monkeypatch.setattr(work, "broadcast", lambda there: torch.zeros_like(there))  # of the first: nothing is there
    second = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    made = []

    def make(unit, *rest):
        made.append(unit.name)
        return draw(unit, *rest)

    work.run(units(4), make, replace(session, state=second), seed=0, label="")
    assert made == ["unit-1", "unit-3"]


def test_a_process_whose_partner_is_gone_says_so_in_a_line(session, capsys, monkeypatch):
    def lost(told):
        raise RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:62653")

    monkeypatch.setattr(work, "gather_object", lost)
    assert launch.status(session.wait) == 1
    assert capsys.readouterr().err == "edc-hub: another process of this run has stopped; its message says why\n"


def test_torchrun_is_told_what_is_wrong(tmp_path, monkeypatch, capsys):
    def wrong():
        raise InputError("ipc: too many;\n write less")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert launch.status(wrong) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["message"] == "edc-hub: error: ipc: too many; write less" == capsys.readouterr().err.strip()
    assert abs(failure.timestamp - time.time()) < 60  # the first failure is the one that is shown


def test_a_lock_without_its_owners_name_is_still_a_lock(tmp_path):
    with disk.lock(tmp_path):
        (tmp_path / ".lock.json").write_text("")
        with pytest.raises(InputError, match="is being written by process"), disk.lock(tmp_path):
            pass
