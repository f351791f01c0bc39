"""Speed-up against latency: the engine on one host, the draft server on another, TCP with keys between them.

The hosts are two network namespaces with addresses of their own (`two_hosts`; Linux, as root). On the draft server's host a relay
passes on what travels, later by so many ms each way. Forwards of both models are emulated, so that two cores do not decide it. Rows
are plain vLLM, the same draft server as the engine's child (no network), and the network with each delay; repetitions are
interleaved. At the end the wire is cut in the middle of a run and joined again: the answers must stay the same, and drafts be
accepted again.

Owns what is run, its table and the result file. Runs offline:

    sudo .venv/bin/python benchmarks/bench_network.py --out result.json
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_conditions import parse_emulation
from benchmarks.decode_intervals import bootstrap
from benchmarks.decode_rows import BASELINE, Entry, Row
from benchmarks.replay import HOLDOUT, PROMPT_CHARACTERS
from benchmarks.result_file import begin, finish, require_counts, say
from benchmarks.two_hosts import ADDRESSES, NoHostsError, TwoHosts
from tests.e2e.relay import Conditions, Relay
from vllm_specbranch.compare import as_json, first_differences, transformers_gaps, with_gaps
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.keys import make_keys
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.measure_messages import Emulation, RunResult
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, provenance
from vllm_specbranch.report import number, output_gaps_s, percent, table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
# Exit status of what cannot be run on this machine, by the custom of test drivers; `make bench` goes on after it.
EXIT_SKIPPED = 77
NUM_SPECULATIVE_TOKENS = 8
PORT = 5600
CHILD = "child process"
REMOTE = "another host"
# Before each run, so that the running means by which both sides decide are those of this delay.
SETTLING_TOKENS = 24
SERVER_READY_S = 300.0
# A line that was silent is given up after 10 s; then one look for it takes up to 5.
BACK_S = 60.0
CUT_AFTER_S = 1.0


@dataclass
class Case:
    """A line of the table.

    Attributes:
        delay_ms: each way, by the relay; None without a network.
    """

    row: Row
    delay_ms: float | None = None
    differences: list[Mapping[str, object]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        return self.row.name if self.delay_ms is None else f"{REMOTE}, {self.delay_ms:g} ms each way"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if something differs or fails, 2 for words that cannot be used, 77 if it cannot run here."""
    args = _parser().parse_args(argv)
    try:
        return bench(args)
    except NoHostsError as error:
        sys.stderr.write(f"bench_network: {error}\n")
        return EXIT_SKIPPED
    except SpecBranchError as error:
        sys.stderr.write(f"bench_network: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace) -> int:
    """Measure all, then cut the wire; write table and JSON."""
    begin(args.out)
    options = ("num_prompts", "max_tokens", "batch_size", "repetitions")
    require_counts({"--" + name.replace("_", "-"): getattr(args, name) for name in options})
    emulation = parse_emulation(args.emulate, "--emulate")
    if emulation is None:
        raise ConfigError(args.emulate, "durations: two cores would decide it otherwise", "--emulate")
    lineup = Lineup(
        target=str(target_path()),
        draft=str(draft_path()),
        placement=place(available_cores(), 0),
        kv_cache_bytes=64 << 20,
        max_num_seqs=args.batch_size,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        observe=True,
    )
    origin = provenance(Path(__file__).parent)
    texts = [one.text[:PROMPT_CHARACTERS] for one in read_prompts(HOLDOUT, args.num_prompts)]
    with TwoHosts() as hosts, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = Path(folder) / "keys"
        make_keys(keys)
        say("Starting the draft server ...\n")
        with hosts.on("draft"):
            relay = stack.enter_context(Relay(f"{ADDRESSES['draft']}:{PORT}", host=ADDRESSES["draft"]))
            stack.enter_context(_serving(args, lineup, emulation, keys))
        specs = [
            lineup.plain(BASELINE),
            lineup.specbranch(NUM_SPECULATIVE_TOKENS, CHILD),
            lineup.specbranch(
                NUM_SPECULATIVE_TOKENS,
                REMOTE,
                draft_placement=relay.address,
                draft_keys=str(keys),
                draft_cpu_cores=None,
            ),
        ]
        say(f"Starting {len(specs)} engines ...\n")
        # There is no route by which vLLM could find the address of its own that it wants to know.
        os.environ["VLLM_HOST_IP"] = ADDRESSES["engine"]
        with hosts.on("engine"), running(specs, at_once=2) as engines:
            prompts = engines[0].encode(texts)
            runner = _Runner(args, emulation, relay, engines, prompts)
            cases = runner.measure()
            cut = runner.cut(hosts, args.cut_s)
    runner.compare([*cases, cut.case], lineup.target)
    lines = [_line(case, cases[0], args.seed) for case in cases]
    say("\n" + as_table(lines) + "\n\n" + cut.as_text() + "\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "options": vars(args),
        "runs_on": lineup.placement.describe(with_draft=True),
        "lines": lines,
        "cut": cut.as_json(),
    }
    finish(result, args.out)
    is_same = not any(case.differences for case in (*cases, cut.case))
    return 0 if is_same and cut.is_back else 1


@dataclass
class Cut:
    """What a cut of the wire did.

    Attributes:
        seconds: how long it was cut.
        case: the run in which it was; nothing else of it is a measurement.
        back_s: from the joining until drafts were accepted again; None if that took too long.
        num_accepted: draft tokens accepted before, during and after the run with the cut, in runs of the same length.
    """

    seconds: float
    case: Case
    back_s: float | None
    num_accepted: tuple[int, int, int]
    longest_gap_ms: tuple[float, float]

    @property
    def is_back(self) -> bool:
        """Whether drafts were accepted again."""
        return self.back_s is not None

    def as_text(self) -> str:
        """A sentence or two."""
        before, during, after = self.num_accepted
        back = f"again {self.back_s:.1f} s after the joining" if self.back_s is not None else "NEVER again"
        said = "the same" if not self.case.differences else "DIFFERENT"
        return (
            f"Wire cut for {self.seconds:g} s in the middle of a run: answers {said}; drafts accepted {back} "
            f"(accepted tokens of a run before, with the cut, after: {before}, {during}, {after}); longest gap between outputs "
            f"{self.longest_gap_ms[1]:.0f} ms, without the cut {self.longest_gap_ms[0]:.0f} ms."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seconds": self.seconds,
            "back_s": self.back_s,
            "num_accepted": self.num_accepted,
            "longest_gap_ms": self.longest_gap_ms,
            "differences": self.case.differences,
            "engine_counters": self.case.row.runs[0].engine_counters,
        }


class _Runner:
    """Runs the engines, one at a time."""

    def __init__(
        self,
        args: argparse.Namespace,
        emulation: Emulation,
        relay: Relay,
        engines: Sequence[Engine],
        prompts: list[list[int]],
    ) -> None:
        self._args = args
        self._emulation = emulation
        self._relay = relay
        self._engines = {engine.spec.name: engine for engine in engines}
        self._prompts = prompts

    def measure(self) -> list[Case]:
        """All lines of the table, the baseline first; the first repetition is the warm-up."""
        cases = [Case(self._row(BASELINE)), Case(self._row(CHILD))]
        cases += [Case(self._row(REMOTE), delay_ms) for delay_ms in self._args.delays_ms]
        shuffler = random.Random(self._args.seed)
        for repetition in range(self._args.repetitions + 1):
            started_s = time.monotonic()
            for case in shuffler.sample(cases, len(cases)):
                self._relay.set(Conditions(delay_s=1e-3 * (case.delay_ms or 0.0)))
                self._run(case.row.name, SETTLING_TOKENS, settles=True)
                if repetition:
                    case.row.runs.append(self._run(case.row.name))
            say(f"Repetition {repetition} of {self._args.repetitions} done in {time.monotonic() - started_s:.0f} s.\n")
        return cases

    def cut(self, hosts: TwoHosts, seconds: float) -> Cut:
        """Cut the wire in a run, join it again, and go on until drafts are accepted again."""
        self._relay.set(Conditions(delay_s=0.0))
        before = self._run(REMOTE)
        joined: list[float] = []

        def disturb() -> None:
            time.sleep(CUT_AFTER_S)
            hosts.cut()
            time.sleep(seconds)
            hosts.heal()
            joined.append(time.monotonic())

        thread = threading.Thread(target=disturb)
        thread.start()
        during = self._run(REMOTE)
        thread.join()
        back_s = None
        while back_s is None and time.monotonic() < joined[0] + BACK_S:
            if self._run(REMOTE, SETTLING_TOKENS, settles=True).num_accepted_tokens:
                back_s = time.monotonic() - joined[0]
        runs = (before, during, self._run(REMOTE))
        case = Case(self._row(REMOTE), 0.0)
        case.row.runs += [during, runs[2]]
        first, second, third = (run.num_accepted_tokens for run in runs)
        return Cut(seconds, case, back_s, (first, second, third), (longest_gap_ms(before), longest_gap_ms(during)))

    def compare(self, cases: Sequence[Case], target: str) -> None:
        """Compare every run with the first one of the baseline. Mutates: cases."""
        gap_of = transformers_gaps(target)
        expected = [request.token_ids for request in cases[0].row.runs[0].requests]
        for case in cases:
            outputs = [[request.token_ids for request in run.requests] for run in case.row.runs]
            found = dict.fromkeys(one for got in outputs for one in first_differences(case.name, expected, got))
            measured = with_gaps(list(found), self._prompts, expected, gap_of)
            case.differences = as_json([one for one in measured if not one.is_tie])

    def _row(self, name: str) -> Row:
        spec = self._engines[name].spec
        return Row(Entry(spec, name, "", 1 + (name != BASELINE)), self._args.batch_size)

    def _run(self, name: str, max_tokens: int | None = None, settles: bool = False) -> RunResult:
        batch_size = self._args.batch_size
        prompts = self._prompts[: max(1, batch_size)] if settles else self._prompts
        engine = self._engines[name]
        return engine.run(prompts, max_tokens or self._args.max_tokens, batch_size, emulation=self._emulation)


def longest_gap_ms(run: RunResult) -> float:
    """Between two outputs of a request."""
    return 1e3 * max((gap for trace in run.requests for gap in output_gaps_s(trace)), default=0.0)


@contextlib.contextmanager
def _serving(args: argparse.Namespace, lineup: Lineup, emulation: Emulation, keys: Path) -> Iterator[None]:
    """Start the draft server on this thread's host, and wait until it is ready; end it at the end."""
    words = [f"{emulation.draft_step_ms}:{emulation.draft_token_cost}", "--model", lineup.draft]
    words += ["--bind", f"tcp://{ADDRESSES['draft']}:{PORT}", "--keys", str(keys), "--dtype", lineup.dtype]
    words += ["--cores", ",".join(map(str, lineup.placement.draft_cores)), "--max-model-len", str(lineup.max_model_len)]
    words += ["--enforce-eager"] if args.enforce_eager else []
    script = Path(__file__).with_name("emulated_draft_server.py")
    with (
        (keys.parent / "server.log").open("w+") as log,
        subprocess.Popen([sys.executable, str(script), *words], stdout=log, stderr=log) as server,
    ):
        try:
            _wait_until_ready(server, Path(log.name))
            yield
        finally:
            server.terminate()
            try:
                server.wait(10.0)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(server: "subprocess.Popen[bytes]", log: Path) -> None:
    until_s = time.monotonic() + SERVER_READY_S
    while "draft server ready" not in log.read_text():
        if server.poll() is not None or time.monotonic() > until_s:
            raise SpecBranchError(f"the draft server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def _line(case: Case, plain: Case, seed: int) -> dict[str, Any]:
    ratios = case.row.ratios(plain.row)
    runs = case.row.runs
    counts = {name: sum(run.engine_counters.get(name, 0.0) for run in runs) for name in _ENGINE_COUNTS}
    hits, rounds = (sum(run.server_counters.get(name, 0.0) for run in runs) for name in ("num_hits", "num_rounds"))
    replies = counts["num_commit_batches"]
    return {
        "name": case.name,
        "delay_ms": case.delay_ms,
        "ratio_to_plain": statistics.median(ratios),
        "interval": bootstrap(ratios, seed),
        "tokens_per_s": case.row.tokens_per_s,
        "acceptance_length": 1
        + sum(run.num_accepted_tokens for run in runs) / max(1, sum(run.num_drafts for run in runs)),
        "hit_rate": hits / rounds if rounds else None,
        "wait_ms": 1e3 * counts["wait_s"] / replies if replies else None,
        "num_commit_batches": counts["num_commit_batches"],
        "num_reply_timeouts": counts["num_reply_timeouts"],
        "num_overruns": sum(run.num_overruns for run in runs),
        "differences": case.differences,
        "wall_s": [run.wall_s for run in runs],
    }


_ENGINE_COUNTS = ("wait_s", "num_commit_batches", "num_reply_timeouts")


def as_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line per case."""
    headers = ["", "÷ plain", "95%", "tokens/s", "accepted + 1", "hits", "wait per round, ms", "late", "token ids"]
    return table(
        headers,
        [
            [
                line["name"],
                number(line["ratio_to_plain"]),
                "..".join(map(number, line["interval"])),
                number(statistics.median(line["tokens_per_s"])),
                number(line["acceptance_length"]),
                "" if line["hit_rate"] is None else percent(line["hit_rate"]),
                "" if line["wait_ms"] is None else number(line["wait_ms"]),
                f"{line['num_reply_timeouts']:.0f} of {line['num_commit_batches']:.0f}",
                "DIFFERENT" if line["differences"] else "the same",
            ]
            for line in lines
        ],
    )


def _delays_ms(text: str) -> list[float]:
    try:
        delays = [float(part) for part in text.split(",")]
    except ValueError:
        delays = [-1.0]
    if not all(0 <= one <= 1000 for one in delays):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; allowed: numbers of ms in 0..1000, such as 0,2,10")
    return list(dict.fromkeys(delays))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_network",
        description="Speed-up against latency, with engine and draft server on two hosts (network namespaces; needs root).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--delays-ms", type=_delays_ms, default="0,0.2,2,10", help="what the relay adds each way")
    add("--emulate", default="20:2", help="TARGET_MS:DRAFT_MS[:ROW_COST], durations of the forwards of both models")
    add("--num-prompts", type=int, default=4, help="prompts of the shipped set")
    add("--max-tokens", type=int, default=64, help="new tokens per prompt")
    add("--batch-size", type=int, default=1, help="requests at the same time")
    add("--repetitions", type=int, default=5, help="of every line, after the warm-up")
    add("--cut-s", type=float, default=3.0, help="how long the wire is cut at the end")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    add("--seed", type=int, default=0, help="of the order and of the intervals")
    return made


if __name__ == "__main__":
    sys.exit(main())
