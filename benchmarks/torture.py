"""Torture: a training run that is disturbed at random moments must end with the weights of an undisturbed one.

examples:
  python benchmarks/torture.py                                     # 210 faults over 420 steps
  python benchmarks/torture.py --faults 14 --steps 40 --seed 3     # a short one
  python benchmarks/torture.py --processes 2 --faults 70

A micro creature trains on the CPU, with dropout, accumulation and evaluation, and saves every few steps. Each attempt
is disturbed once: killed, asked to stop, left with a full disk, or killed and its newest checkpoint truncated,
bit-flipped or deleted. Then it is started again with --resume, until all faults are spent; the last attempt is left
alone. At the end weights and losses must be those of a run that nobody disturbed, bit for bit; the exit code is 1
where they are not, where a run could not go on, hung, or showed a traceback.

A moment is a random number of lines of the run's output and a few random milliseconds after them. torch is imported
once, and every attempt is a fork of that process. Linux only; the full disk is a tmpfs in a mount namespace of our own,
which not every system permits: that fault then happens zero times.
"""

import argparse
import contextlib
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
PROJECT = Path(__file__).resolve().parent.parent
sys.path[0] = str(PROJECT)
sys.path.append(str(PROJECT / "tests"))

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "disk full", "truncated file", "flipped bit", "newest deleted")
DAMAGES = KINDS[4:]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PHASES = ("starting", "training", "saving", "finishing")
DISK_BYTES = 48 << 20  # room for some dozen checkpoints
PATIENCE = 120  # seconds without an end after a fault, after which an attempt counts as hung
IN_NAMESPACE = "TORTURE_MOUNTS"  # set in the process that may mount

SETTINGS = {
    "data": dict(data="corpus.bin", tokenizer_name="tokenizer", max_eval_blocks=2),
    "training": dict(
        tokens_per_step=256, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=4,
        eval_steps=7, warmup_steps=2, cpu_threads=1, use_cpu=True,
    ),
}  # fmt: skip


class Attempt:
    """One start of the run, disturbed or not, and what became of it."""

    def __init__(self, kind: str | None):
        self.kind = kind
        self.phase = self.text = ""
        self.codes: list[int] = []
        self.hung = False
        self.steps: list[int] = []  # that it did
        self.reached = 0  # the last step that was done
        self.lost = 0  # steps from there back to the checkpoint to go on from


class Run:
    """The run under torture: its folder and its processes."""

    def __init__(self, place: Path, disk: Path, options: argparse.Namespace, moments: random.Random):
        self.place, self.disk, self.folder = place, disk, disk / "run"
        self.options, self.moments = options, moments

    def attempt(self, kind: str | None, lines: int, seconds: float, *flags: str) -> Attempt:
        """Start the run, disturb it so long after so many lines of its output, and wait for its end."""
        attempt, reader, pids = Attempt(kind), *self._start(*flags)
        output = self._read(reader, lines if kind else None, PATIENCE * 5)
        if kind == "disk full":
            time.sleep(seconds)
            self._fill_disk(self.moments.randrange(self._checkpoint_bytes()))
            output += self._read(reader, 8, PATIENCE) or ""
            self._fill_disk(0)  # fill again what the run has deleted meanwhile
        elif kind:
            time.sleep(seconds)
            self.moments.shuffle(pids)
            for pid in pids:
                os.kill(pid, getattr(signal, kind, signal.SIGKILL))
        rest = self._read(reader, None, PATIENCE)
        attempt.hung = rest is None
        attempt.text = (output or "") + (rest or "")
        for pid in pids:
            if attempt.hung:
                os.kill(pid, signal.SIGKILL)
            attempt.codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.close(reader)
        (self.disk / "filler").unlink(missing_ok=True)
        attempt.steps = [int(step) for step in re.findall(r"^step +(\d+)/", attempt.text, re.M)]
        attempt.reached = max(attempt.steps, default=0)
        attempt.phase = "training" if attempt.steps else "starting"
        if attempt.reached >= self.options.steps:
            attempt.phase = "finishing"
        elif (self.folder / ".writing").exists():
            attempt.phase = "saving"
        return attempt

    def _start(self, *flags: str) -> tuple[int, list[int]]:
        """(the descriptor to read the output of all processes from, their ids)."""
        count = self.options.processes
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        reader, writer = os.pipe()
        pids = []
        for rank in range(count):
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a fork takes them once it can handle them
            pid = os.fork()
            if pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                pids.append(pid)
                continue
            world = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            _become_run(writer, self.place, self.folder, self.options.steps, flags, world if count > 1 else {})
        os.close(writer)
        return reader, pids

    def _read(self, reader: int, lines: int | None, seconds: float) -> str | None:
        """The output up to so many lines, the last step's line or the end; None if that takes longer than `seconds`."""
        text, end = "", time.monotonic() + seconds
        last = f"step {self.options.steps:>6,}/"
        while lines is None or text.count("\n") < lines and last not in text:
            ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(reader, 1 if lines is not None else 1 << 16)  # not beyond the line to wait for
            if not data:
                break
            text += data.decode("utf-8", errors="replace")
        return text

    def _fill_disk(self, left: int) -> None:
        """Fill the disk until about `left` bytes are free."""
        with open(self.disk / "filler", "ab") as file:
            for _ in range(100):  # the run may write meanwhile
                with contextlib.suppress(OSError):
                    more = shutil.disk_usage(self.disk).free - left
                    if more > 0:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)
                    return

    def damage(self, kind: str) -> None:
        """Damage the newest checkpoint."""
        from creature.checkpoints import list_checkpoints

        newest = list_checkpoints(self.folder)[-1]
        if kind == "newest deleted":
            shutil.rmtree(newest)
            return
        files = sorted(path for path in newest.iterdir() if path.stat().st_size)
        tensors = [path for path in files if path.suffix in (".safetensors", ".pt", ".pth")]
        path = self.moments.choice(self.moments.choice((files, tensors)))
        data = bytearray(path.read_bytes())
        if kind == "truncated file":
            data = data[: self.moments.randrange(len(data))]
        else:
            data[self.moments.randrange(len(data))] ^= 1 << self.moments.randrange(8)
        path.write_bytes(data)

    def whole_steps(self) -> list[int]:
        """The steps of the whole checkpoints, in order."""
        from creature.checkpoints import list_checkpoints, problem_with, step_of

        return [step_of(path) for path in list_checkpoints(self.folder) if problem_with(path) is None]

    def _checkpoint_bytes(self) -> int:
        newest = next((self.place / "whole").glob("checkpoint-*"))
        return sum(path.stat().st_size for path in newest.rglob("*"))


def _become_run(writer: int, place: Path, folder: Path, steps: int, flags: tuple[str, ...], world: dict) -> None:
    """In a forked child: be `python run_clm_creature.py ...` with all output in the pipe; never returns."""
    code = 70
    try:
        os.setsid()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(place)
        os.environ.update({name: str(value) for name, value in world.items()})
        sys.argv = ["run_clm_creature.py", "--config", "micro.yaml", "--max_steps", str(steps)]
        sys.argv += ["--output_dir", str(folder), *flags]
        import run_clm_creature
        from creature import launch

        def main() -> int | None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return run_clm_creature.main()

        launch.run(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def prepare(place: Path) -> None:
    """The micro configuration, tokens that can be learned, and a tokenizer of 64 words."""
    import numpy as np
    import yaml
    from creatures import MICRO  # of the tests
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = MICRO["model"] | {"vocab_size": 64}
    (place / "micro.yaml").write_text(yaml.safe_dump(SETTINGS | {"model": model}), encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, 5, 6000).cumsum() % 60
    ids.astype(np.uint16).tofile(place / "corpus.bin")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {"<unk>": 62, "<end>": 63}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(place / "tokenizer")


def torture(run: Run, kinds: list[str]) -> tuple[list[Attempt], str | None]:
    """Every fault once, then the rest of the run undisturbed: (the disturbed attempts, what went wrong or None)."""
    done: list[Attempt] = []
    steps, waiting, startup = run.options.steps, list(kinds), 12
    ending = max(1, len(kinds) // 20)
    while True:
        whole = run.whole_steps()
        before = whole[-1] if whole else 0
        kind = _next_fault(waiting, len(whole))
        # The faults are spread over the run, a quarter over what comes before its first step. The last ones are kills
        # and find it ending; any other would let it end.
        last = len(done) >= len(kinds) - ending
        goal, room = steps * (len(done) + 1) / len(kinds) - before, steps - before - 16
        if last and before < steps:
            lines = steps * 10  # which are cut off at the last step
        elif room < 1 or run.moments.random() < 0.25:
            lines = run.moments.randrange(run.moments.choice((4, startup)))
        else:
            lines = startup + run.moments.randrange(min(room, 1 + 2 * max(1, round(goal))))
        seconds = run.moments.random() * run.options.delay / 1000 * (5 if last else 1)
        attempt = run.attempt(kind, lines, seconds, *(["--resume"] if whole else []))
        if before >= steps:
            attempt.phase = "finishing"
        if attempt.steps:
            startup = max(startup, attempt.text[: attempt.text.index("\nstep ")].count("\n"))
        finished = _status(run.folder) == "finished"
        if kind in DAMAGES and not finished:
            if len(run.whole_steps()) > 1:
                run.damage(kind)
            else:  # there would be no checkpoint to resume: count it as a plain kill
                waiting.append(kind)
                attempt.kind = "SIGKILL"
        whole = run.whole_steps()
        attempt.reached = attempt.reached or before
        attempt.lost = max(0, attempt.reached - (whole[-1] if whole else 0))
        if problem := _problem(attempt, before, finished):
            return done, f"{kind or 'the undisturbed end'}: {problem}\n{attempt.text[-3000:]}"
        if kind is None:
            return done, None
        done.append(attempt)
        if run.options.verbose:
            last = ([""] + attempt.text.strip().splitlines())[-1][:100]
            facts = f"{kind:15} {attempt.phase:9} step {attempt.reached:4} lost {attempt.lost:3} {attempt.codes}"
            print(f"{len(done):4} {facts} {last}", flush=True)
        if finished:
            return done, None


def _next_fault(waiting: list[str], whole: int) -> str | None:
    """The next fault, None when all are spent; a damage only where three checkpoints are complete."""
    ready = (i for i, kind in enumerate(waiting) if whole > 2 or kind not in DAMAGES)
    return waiting.pop(next(ready, 0)) if waiting else None


def _problem(attempt: Attempt, before: int, finished: bool) -> str | None:
    """What a run must not do after any fault, or None."""
    if attempt.hung:
        return f"did not end within {PATIENCE} s"
    if "Traceback" in attempt.text:
        return "ended with a traceback"
    if before and attempt.steps and f"resuming from checkpoint-{before}\n" not in attempt.text:
        return f"did not go on from checkpoint-{before}"
    asked = attempt.kind in ("SIGTERM", "SIGINT")
    allowed = {"disk full": {0, 1}, None: {0}}.get(attempt.kind, {0, -signal.SIGKILL})
    if asked:
        allowed = {0}
    if not set(attempt.codes) <= allowed:
        return f"ended with {attempt.codes}"
    if attempt.kind is None and not finished or asked and attempt.lost:
        return "did not save what it had done"
    return None


def _status(folder: Path) -> str | None:
    from creature.checkpoints import read_run

    return (read_run(folder) or {}).get("status")


def compare(whole: Path, tortured: Path) -> list[str]:
    """What differs between the two runs: weights, losses."""
    import torch
    from safetensors.torch import load_file

    from creature.checkpoints import read_metrics

    found = []
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, tortured))
    if first.keys() != second.keys():
        found.append("the names of the weights")
    different = [name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])]
    if different:
        found.append(f"{len(different)} of {len(first)} weights")
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
        curves = [{e["step"]: e[key] for e in read_metrics(folder) if key in e} for folder in (whole, tortured)]
        if curves[0] != curves[1]:
            steps = [step for step in curves[0] | curves[1] if curves[0].get(step) != curves[1].get(step)]
            found.append(f"the logged {key} from step {min(steps)}")
    return found


def table(attempts: list[Attempt], recovered: int) -> str:
    """A line for each kind of fault: how often, how often recovered, steps lost; then a line with the phases."""
    lines = [f"{'fault':15}  {'times':>5}  {'recovered':>9}  {'mean steps lost':>15}  {'max':>4}  {'ended with 0':>12}"]
    for kind in (*KINDS, "all"):
        some = [(i, a) for i, a in enumerate(attempts) if kind in (a.kind, "all")]
        lost = [a.lost for _, a in some]
        mean = f"{sum(lost) / len(lost):15.2f}" if lost else f"{'-':>15}"
        went_on = sum(i < recovered for i, _ in some)
        clean = sum(not any(a.codes) for _, a in some)
        lines.append(f"{kind:15}  {len(some):5}  {went_on:9}  {mean}  {max(lost, default=0):4}  {clean:12}")
    phases = Counter(a.phase for a in attempts)
    lines.append("the run was " + ", ".join(f"{phase} {phases[phase]} times" for phase in PHASES))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=210, help="number of faults, of all kinds in turn (default 210)")
    parser.add_argument("--steps", type=int, default=420, help="steps of the run (default 420)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their moments (default 0)")
    parser.add_argument("--delay", type=float, default=60, help="at most so many ms after a line (default 60)")
    parser.add_argument("--verbose", action="store_true", help="print a line for each fault")
    return parser.parse_args()


def enter_namespace() -> None:
    """Restart in a mount namespace, whose tmpfs vanishes with this process; without one where that is refused."""
    if IN_NAMESPACE in os.environ or not shutil.which("unshare"):
        return
    words = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0:
        os.execvpe(words[0], [*words, sys.executable, *sys.argv], os.environ | {IN_NAMESPACE: "1"})


def main() -> int:
    options = parse_arguments()
    enter_namespace()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    import run_clm_creature  # noqa: F401
    from creature import job, report  # noqa: F401  what every attempt would import

    torch.set_num_threads(1)
    began = time.perf_counter()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        place, disk = Path(place), Path(place, "disk")
        disk.mkdir()
        kinds = list(KINDS)
        if IN_NAMESPACE in os.environ:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True)
        else:
            print("no tmpfs may be mounted here, so the disk is never full")
            kinds.remove("disk full")
        prepare(place)
        run = Run(place, disk, options, moments)
        faults = [kinds[i % len(kinds)] for i in range(options.faults)]
        moments.shuffle(faults)
        for _ in range(max(1, len(faults) // 20)):  # those that find the run ending, see `torture`
            faults.append(faults.pop(faults.index("SIGKILL")))
        try:
            run.folder = place / "whole"
            whole = run.attempt(None, 0, 0)
            if any(whole.codes):
                print(whole.text[-3000:])
                return 1
            run.folder = disk / "run"
            attempts, problem = torture(run, faults)
            print(table(attempts, len(attempts) - bool(problem)))
            differences = [] if problem else compare(place / "whole", run.folder)
        finally:
            if IN_NAMESPACE in os.environ:
                subprocess.run(["umount", str(disk)])
    seconds = time.perf_counter() - began
    print(f"{len(attempts)} faults over {options.steps} steps in {options.processes} process(es), {seconds:.0f} s")
    if problem:
        print(problem)
    elif differences:
        print(f"differs from the undisturbed run: {', '.join(differences)}")
    else:
        print("weights and logs are those of the undisturbed run, bit for bit")
    return int(bool(problem or differences))


if __name__ == "__main__":
    sys.exit(main())
