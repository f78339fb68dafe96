import argparse
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments.benchmarks import gpu, harness
from experiments.benchmarks.harness import Row, Run, Variant, ratio, report, take_turns
from experiments.benchmarks.workloads import WORKLOADS, vectors, workload
from fedsim.engine import local, step, tape
from fedsim.engine.stacks import Stacks
from fedsim.models.stacked import StackedBatchNorm


def a_run(*seconds):
    return Run(startup_seconds=1.0, seconds=list(seconds), pss_mib=1.0, peak_mib=1.0)


def steady(seconds):
    """A run of five rounds after the first: one of warm-up, three that count, and the last."""
    return a_run(9.0, seconds, seconds, seconds, 9.0)


def variants(*names):
    return [Variant(name=name, run=steady, arguments={}) for name in names]


def test_warm_up_and_the_last_round_do_not_count():
    # Rounds 2 (warm-up), 3, 4, 5 and 6, after which the model is tested.
    run = a_run(50.0, 1.0, 4.0, 2.0, 90.0)

    assert run.counted == [1.0, 4.0, 2.0]
    assert run.round_seconds == 2.0


def test_variants_take_turns():
    order = []

    def measure(variant):
        order.append(variant.name)
        return steady(float(len(order)))

    a, b = take_turns(variants("a", "b"), 3, lambda all_: map(measure, all_))

    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [run.round_seconds for run in a.runs] == [1.0, 3.0, 5.0]
    assert [run.round_seconds for run in b.runs] == [2.0, 4.0, 6.0]


def test_a_rows_seconds_are_the_median_over_the_rounds_of_all_repeats():
    row = Row(name="a", runs=[a_run(0.0, 1.0, 2.0, 0.0), a_run(0.0, 3.0, 10.0, 20.0, 0.0)])

    assert row.counted == [1.0, 2.0, 3.0, 10.0, 20.0]
    assert row.round_seconds == 3.0


def test_the_ratio_is_taken_within_each_repeat():
    # The machine slows down fourfold; each repeat's own ratio is 2, 2 and 3.
    ours = Row(name="ours", runs=[steady(1.0), steady(2.0), steady(4.0)])
    theirs = Row(name="theirs", runs=[steady(2.0), steady(4.0), steady(12.0)])

    assert ratio(theirs, ours) == 2.0


def test_a_variant_runs_in_a_fresh_process(monkeypatch, tmp_path):
    (tmp_path / "fresh.py").write_text(
        "import os, time\n"
        "from experiments.benchmarks.harness import Measured\n"
        "def run(rounds):\n"
        "    end = time.monotonic()\n"
        "    ends = [end + r for r in range(rounds)]\n"
        "    return Measured(ends=ends, pss_mib=2.0, peak_mib=3.0, more={'process': os.getpid()})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import fresh

    run = harness.measure(Variant(name="fresh", run=fresh.run, arguments={"rounds": 4}))

    assert run.seconds == pytest.approx([1.0, 1.0, 1.0])
    assert run.startup_seconds > 0
    assert (run.pss_mib, run.peak_mib) == (2.0, 3.0)
    assert run.more["process"] != os.getpid()


def test_variants_take_turns_round_by_round(monkeypatch, tmp_path):
    (tmp_path / "rounds.py").write_text(
        "import time\n"
        "from experiments.benchmarks.harness import Measured, Stopwatch\n"
        "def run(name, log, rounds=4):\n"
        "    watch = Stopwatch()\n"
        "    for done in range(1, rounds + 1):\n"
        "        with open(log, 'a') as file:\n"
        "            file.write(name)\n"
        "        watch.lap(last=done == rounds)\n"
        "        if name == 'x':\n"
        "            raise SystemExit(7)\n"
        "    return Measured(ends=watch.ends, begins=watch.begins, pss_mib=2.0, peak_mib=3.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import rounds

    log = tmp_path / "log"

    def variant(name):
        return Variant(name=name, run=rounds.run, arguments={"name": name, "log": str(log)})

    a, b = take_turns([variant("a"), variant("b")], 1, harness.measure_together)

    assert log.read_text() == "abababab"
    assert [len(row.runs[0].seconds) for row in (a, b)] == [3, 3]
    assert b.runs[0].startup_seconds > 0
    with pytest.raises(SystemExit, match="x ended with exit code 7"):
        take_turns([variant("a"), variant("x")], 1, harness.measure_together)


def test_a_ratio_by_round_is_that_of_rounds_that_followed_each_other():
    # The machine is half as fast from round to round; each pair's ratio is 3, 3 and 2.
    ours = Row(name="ours", runs=[a_run(0.0, 1.0, 2.0, 4.0, 0.0)])
    theirs = Row(name="theirs", runs=[a_run(0.0, 3.0, 6.0, 8.0, 0.0)])

    assert harness.ratio_by_round(theirs, ours) == 3.0


def test_the_report_ends_with_the_ratio_and_writes_everything_down(capsys, tmp_path):
    file = tmp_path / "found.json"
    args = argparse.Namespace(rounds=6, repeats=1, json=file, described={"commit": "abc"})

    report("work", args, [Row(name="ours", runs=[steady(0.5)])], harness.SECONDS, 25.304)

    assert capsys.readouterr().out.splitlines()[-1] == "ratio 25.30"
    found = json.loads(file.read_text())
    assert (found["ratio"], found["commit"], found["rounds"]) == (25.304, "abc", 6)
    assert found["rows"][0]["round_seconds"] == 0.5
    assert found["rows"][0]["runs"][0]["seconds"] == [9.0, 0.5, 0.5, 0.5, 9.0]


def test_this_process_has_memory():
    # More than a Python interpreter takes at least; both in MiB.
    mine = harness.pss_mib()
    assert 5 < mine < 100_000
    command = [sys.executable, "-c", "print(flush=True); input('/ray/dashboard/')"]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as below:
        below.stdout.readline()
        assert harness.pss_mib() > harness.pss_mib(without=harness.RAYS_OWN) + 1
        below.communicate(b"\n")
    assert 5 < harness.peak_mib() < 100_000


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_experiments(name):
    work = workload(name, rounds=7)

    assert work.training.rounds == work.evaluation.every == 7
    assert work.training.participation == WORKLOADS[name]["cohort"]


def test_a_vector_tells_its_class_and_draws_are_the_same_each_time():
    source = vectors(examples=4000)

    # Each class has one feature that is 2 on average, the others 0.
    means = [source.x_train[source.y_train == c].mean(axis=0) for c in range(8)]
    assert [int(mean.argmax()) for mean in means] == list(range(8))
    assert (source.x_train == vectors(examples=4000).x_train).all()


class TestCommandLineFailure:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [(["--rounds", "3"], "must be at least 4"), (["--repeats", "0"], "must be at least 1")],
    )
    def test_too_few(self, monkeypatch, capsys, arguments, said):
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])

        with pytest.raises(SystemExit):
            harness.parse(harness.parser("Something.", rounds=12))

        assert said in capsys.readouterr().err

    def test_a_variant_that_fails(self):
        broken = Variant(name="broken", run=harness.run_fedsim, arguments={"no": "such"})

        with pytest.raises(SystemExit, match="broken ended with exit code 1"):
            harness.measure(broken)


def test_the_benchmark_for_a_device_runs_on_the_processor(monkeypatch, capsys, tmp_path):
    arguments = "--device cpu --models resnet8 --batch-sizes 2 --clients 2 --examples 4 --steps 1"
    file = tmp_path / "gpu.json"
    more = f"--rounds 1 --curve 2 --json {file}"
    monkeypatch.setattr("sys.argv", ["gpu", *arguments.split(), *more.split()])

    gpu.main()

    printed = capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["at_a_time"] == 2
    curves = re.findall(r"loss and accuracy, (.*): (.*)", printed)
    assert [way for way, _ in curves] == ["side by side", "one by one"]
    stacked, alone = ([float(number) for number in re.findall(r"[\d.]+", of)] for _, of in curves)
    assert len(stacked) == 2 * 2
    assert stacked[::2] == pytest.approx(alone[::2], abs=2e-3)
    assert stacked[1::2] == pytest.approx(alone[1::2], abs=0.3)  # per cent
    assert row["difference"] < 1e-5
    # ResNet-8 by hand, of one example: a convolution's forward pass, and the gradient towards its
    # weights, are 2 * kernel * in * out * pixels each; all but the first one also need the gradient
    # towards their input.
    stem = 2 * 9 * 3 * 16 * 32**2
    others = (
        2 * 9 * (16 * 16 * 2 * 32**2 + (16 * 32 + 32 * 32) * 16**2 + (32 * 64 + 64 * 64) * 8**2)
    )
    shortcuts_and_head = 2 * (16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 100)
    flops = 2 * stem + 3 * (others + shortcuts_and_head)
    examples = 2 * 2  # a step of two examples for each of two clients
    assert row["teraflops"] * row["side_by_side"] * 1e12 == pytest.approx(
        examples * flops, rel=0.01
    )
    assert float(printed.rsplit("ratio ", 1)[1]) == pytest.approx(
        row["plain_loop"] / row["side_by_side"], abs=0.01
    )


def run_gpu(monkeypatch, capsys, file, arguments):
    """Run small rows on the processor; return their JSON, what was printed and the exit's words."""
    small = f"--device cpu --examples 4 --steps 1 --rounds 1 --json {file} {arguments}"
    monkeypatch.setattr("sys.argv", ["gpu", *small.split()])
    said = ""
    try:
        gpu.main()
    except SystemExit as exit:
        said = exit.code
    return json.loads(file.read_text()), capsys.readouterr().out, said


def without_a_step(monkeypatch):
    descend = step.descend

    def alone_only(training, w, *others):
        if w[0].dim() == 4:  # the first convolution's weights, not those of many clients
            descend(training, w, *others)

    monkeypatch.setattr(step, "descend", alone_only)


def at_twice_the_learning_rate(monkeypatch):
    descend = step.descend

    def faster(training, w, *others):
        *others, lr = others
        descend(training, w, *others, lr * (w[0].dim() - 3))

    monkeypatch.setattr(step, "descend", faster)


def without_running_statistics(monkeypatch):
    of_batch = StackedBatchNorm._statistics
    monkeypatch.setattr(
        StackedBatchNorm,
        "_statistics",
        lambda self, x, mean, var: of_batch(self, x, mean.clone(), var.clone()),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (without_a_step, "a step differs by 1.0e+00"),
        (at_twice_the_learning_rate, "a step differs by (1.0e+00|9...-01)"),
        (without_running_statistics, "running statistics differs by 1.0e+00"),
    ],
)
def test_the_benchmark_for_a_device_refuses_training_that_is_not_the_same(
    monkeypatch, capsys, tmp_path, precision, fault, why
):
    fault(monkeypatch)
    found, printed, said = run_gpu(
        monkeypatch, capsys, tmp_path / "gpu.json", f"--row resnet8:2:2 --precision {precision}"
    )
    assert found["rows"] == []
    (failed,) = found["failed"]
    assert re.search(why.replace("+", r"\+"), failed["why"])
    assert f"FAILED: {failed['why']}" in printed
    assert said == "1 of 1 rows failed"


def test_in_bfloat16_the_benchmark_for_a_device_is_checked_against_float32(
    monkeypatch, capsys, tmp_path
):
    arguments = "--row resnet8:2:2 --precision bfloat16"
    found, _, said = run_gpu(monkeypatch, capsys, tmp_path / "gpu.json", arguments)
    (row,) = found["rows"]
    assert not said
    assert 1e-4 < row["difference"] < gpu.TOLERANCE["bfloat16"]["resnet8"]
    assert row["buffers"] < gpu.BUFFERS["bfloat16"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), SystemExit("too much")])
def test_rows_of_the_benchmark_for_a_device_outlive_one_that_fails(
    monkeypatch, capsys, tmp_path, error
):
    file = tmp_path / "gpu.json"
    plain, before = gpu.Cohort.plain, []

    def short_of_memory(cohort, clients):
        if cohort.federation.num_clients == 3:
            before.append(json.loads(file.read_text()))
            raise error
        return plain(cohort, clients)

    monkeypatch.setattr(gpu.Cohort, "plain", short_of_memory)
    rows = [("resnet8", 4, 1), ("resnet8", 2, 3), ("resnet8", 2, 2)]
    arguments = " ".join(f"--row {model}:{batch}:{clients}" for model, batch, clients in rows)
    found, printed, said = run_gpu(monkeypatch, capsys, file, arguments)

    def settings(some):
        return [(row["model"], row["batch_size"], row["clients"]) for row in some]

    assert settings(found["rows"]) == [rows[0], rows[2]]
    assert settings(before[0]["rows"]) == [rows[0]]  # nothing waits for the end
    assert settings(found["failed"]) == [rows[1]]
    assert "too much" in found["failed"][0]["why"]
    assert [line.count("|") for line in printed.splitlines() if line.startswith("| ")] == [13] * 4
    assert [*tmp_path.iterdir()] == [file]
    assert said == "1 of 3 rows failed"
    assert found["rows"][0]["share"] == pytest.approx(
        found["rows"][0]["teraflops"] / found["ceiling"]
    )


@pytest.mark.parametrize("text", ["resnet9:8:2", "resnet8:8", "resnet8:x:2", "resnet8:0:2"])
def test_a_row_that_does_not_exist_is_refused(monkeypatch, capsys, text):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--row", text])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert text in capsys.readouterr().err


def test_a_row_says_that_clients_did_not_fit_side_by_side(monkeypatch, capsys, tmp_path):
    together = local.run_stacked
    sizes = []

    def short_of_memory(setting, passes, *others):
        sizes.append(len(passes))
        if len(passes) > 2:
            raise torch.OutOfMemoryError("too much")
        return together(setting, passes, *others)

    monkeypatch.setattr(local, "run_stacked", short_of_memory)
    with pytest.warns(UserWarning, match="don't fit side by side"):
        found, printed, said = run_gpu(
            monkeypatch, capsys, tmp_path / "gpu.json", "--row resnet8:2:4 --row resnet8:2:2"
        )
    crowded, fits = found["rows"]
    assert (crowded["fitted"], crowded["at_a_time"]) == (False, 2)
    assert (fits["fitted"], fits["at_a_time"]) == (True, 2)
    assert printed.count("did not fit side by side as planned") == 1
    assert not said
    assert sizes.count(4) == 2  # in the check and in the first round: later ones know


def test_a_row_says_that_its_steps_were_not_begun_as_one(monkeypatch, capsys, tmp_path):
    class Graphs:
        failed = True

        def capture(self, function, tensors, still):
            return function

    monkeypatch.setattr(Stacks, "are_static", staticmethod(lambda device: True))
    monkeypatch.setattr(tape, "Graphs", Graphs)
    found, printed, _ = run_gpu(monkeypatch, capsys, tmp_path / "gpu.json", "--row resnet8:2:2")
    assert found["rows"][0]["in_graphs"] is False
    assert "capture of a graph failed" in printed


def test_what_the_benchmark_for_a_device_takes_from_the_card(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30)
    )

    def read(*given):
        monkeypatch.setattr("sys.argv", ["gpu", *given])
        args = gpu.arguments()
        return args.precision, args.memory

    assert read() == ("bfloat16", 40.0)
    assert read("--precision", "tf32", "--memory", "8") == ("tf32", 8.0)
    assert read("--device", "cpu") == ("float32", 64.0)
