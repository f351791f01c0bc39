"""The command `vllm-specbranch`.

Owns words and exit codes: 0 fine, 1 something is wrong, 2 the user's words cannot be used. Each command's work is in a module
of its own, imported only when it is called, so that help is quick. Runs in the process that the user started.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_specbranch import __version__, setting_values
from vllm_specbranch.errors import ConfigError, SpecBranchError

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except ConfigError as error:
        return _fail(error, 2)
    except SpecBranchError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _fail(reason: object, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"\nvllm-specbranch: {reason}\n")
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `EngineSettings`."""
    return {
        "prompts": args.prompts,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "target_cores": setting_values.cores(args.target_cores, "--target-cores") if args.target_cores else None,
        "draft_cores": setting_values.cores(args.draft_cores, "--draft-cores") if args.draft_cores else None,
        "max_model_len": args.max_model_len,
        "kv_cache_bytes": int(args.kv_cache_gib * 2**30),
        "enforce_eager": args.enforce_eager,
    }


def _demo(args: argparse.Namespace) -> int:
    from vllm_specbranch import demo

    settings = demo.DemoSettings(
        target=args.target,
        draft=args.draft,
        num_prompts=args.num_prompts,
        num_speculative_tokens=args.num_speculative_tokens,
        draft_model_tokens=args.draft_model_tokens,
        extra_layers=demo.EXTRA_LAYERS if args.extra_layers is None else args.extra_layers,
        **_engine_settings(args),
        json_out=args.json,
    )
    return demo.run(settings, _write)


def _tune(args: argparse.Namespace) -> int:
    from vllm_specbranch import tune

    settings = tune.TuneSettings(
        target=args.target,
        draft=args.draft,
        out=args.out,
        json_out=args.json,
        num_prompts=args.num_prompts,
        batch_size=args.batch_size,
        **_engine_settings(args),
        seed=args.seed,
        always_write=args.always_write,
    )
    return tune.run(settings, _write)


def _train_head(args: argparse.Namespace) -> int:
    from vllm_specbranch import train_head

    settings = train_head.TrainHeadSettings(
        target=args.target,
        draft=args.draft,
        out=args.out,
        num_prompts=args.num_prompts,
        num_rounds=args.rounds,
        num_speculative_tokens=args.num_speculative_tokens,
        num_layers=args.layers,
        temperatures=tuple(args.temperatures),
        batch_size=args.batch_size,
        num_epochs=args.epochs,
        c=args.c,
        miss_cost=args.miss_cost,
        **_engine_settings(args),
        seed=args.seed,
    )
    return train_head.run(settings, _write)


def _doctor(_: argparse.Namespace) -> int:
    from vllm_specbranch import doctor

    return doctor.run(_write)


def _keys(args: argparse.Namespace) -> int:
    from vllm_specbranch import keys

    made = keys.make_keys(args.out) if args.server is None else keys.make_client_keys(args.out, args.server)
    lines = "".join(f"  {path}\n" for path in made)
    whose = "a draft server and of its engines" if args.server is None else "one more engine"
    _write(f"Made the keys of {whose}:\n{lines}{_KEYS_ADVICE}\n")
    return 0


_KEYS_ADVICE = (
    "The server's host needs server.key_secret and clients/, the engines' hosts client.key_secret and server.key. Pass the\n"
    "directory as --keys to `vllm-specbranch draft-server` and as draft_keys to the engine."
)


def _draft_server(args: argparse.Namespace) -> int:
    from vllm_specbranch import standalone

    flags = {
        "model": args.model,
        "num_speculative_tokens": args.num_speculative_tokens,
        "max_model_len": args.max_model_len,
        "draft_cpu_cores": args.cores,
        "draft_kv_cache_bytes": None if args.kv_cache_gib is None else int(args.kv_cache_gib * 2**30),
        "enforce_eager": args.enforce_eager or None,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    twice = sorted(set(given) & set(args.settings))
    if twice:
        raise ConfigError(args.settings[twice[0]], "given once: by its flag or in --settings", twice[0])
    limits = {"max_engines": args.max_engines, "max_requests": args.max_requests}
    settings = standalone.StandaloneSettings(
        bind=args.bind,
        keys=args.keys,
        draft=args.settings | given,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        http=args.http,
        **{name: limit for name, limit in limits.items() if limit is not None},
    )
    return standalone.run(settings, _write)


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; allowed: a JSON object")
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text) if text.strip().lstrip("-").isdecimal() else None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used; allowed: a whole number of at least {least}")
        return value

    return count


def _between(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used; allowed: a number in {least:g}..{most:g}")
        return value

    return number


def _temperatures(text: str) -> list[float]:
    number = _between(0.0, 2.0)
    return list(dict.fromkeys(number(part) for part in text.split(",")))


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; allowed: a number of GiB of at least 0.01")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-specbranch",
        description="Parallel speculative decoding for vLLM: the draft drafts while the target verifies.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-specbranch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="the same prompts by plain vLLM, its draft_model, and specbranch"))
    _add_tune(commands.add_parser("tune", help="choose the settings for a pair of models, and say whether they pay"))
    keys = commands.add_parser("keys", help="make the keys of a draft server that engines reach over TCP")
    keys.set_defaults(command=_keys)
    keys.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory, for its owner alone")
    keys.add_argument(
        "--server", type=Path, metavar="DIR", help="keys of a server: make those of one more engine for it"
    )
    _add_draft_server(commands.add_parser("draft-server", help="serve a draft model to engines, over TCP"))
    _add_train_head(commands.add_parser("train-head", help="train a length head for a pair, and say whether it pays"))
    doctor = commands.add_parser("doctor", help="check whether specbranch can run here")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_demo(demo: argparse.ArgumentParser) -> None:
    count = _at_least(1)
    add = demo.add_argument
    demo.set_defaults(command=_demo)
    add(
        "--target",
        type=Path,
        metavar="PATH",
        help="folder of the target model (default: the shipped one, made heavier)",
    )
    add("--draft", type=Path, metavar="PATH", help="folder of the draft model (default: the shipped one)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".jsonl with id and prompt, .json list, or .txt (default: 16 of HumanEval)",
    )
    add("--num-prompts", type=count, default=8, metavar="N", help="use the first N prompts (default 8)")
    add("--max-tokens", type=count, default=64, metavar="N", help="new tokens per prompt (default 64)")
    add("--num-speculative-tokens", type=count, default=8, metavar="N", help="most draft tokens per round (default 8)")
    add(
        "--draft-model-tokens",
        type=count,
        metavar="N",
        help="draft tokens per round of vLLM's draft_model, which has to wait for each of them (default: half of the above)",
    )
    add("--dtype", default="float32", help="of both models (default float32, in which token ids must be identical)")
    add(
        "--extra-layers",
        type=_at_least(0),
        metavar="N",
        help="layers added to the shipped target; 0 leaves it as it is",
    )
    _add_places(demo)
    add("--json", type=Path, metavar="OUT", help="also write all results to this file")


def _add_tune(tune: argparse.ArgumentParser) -> None:
    count = _at_least(1)
    add = tune.add_argument
    tune.description = (
        "Runs plain vLLM and specbranch on your prompts, measures both models, finds the settings that suit them by replaying "
        "what was recorded, and runs those on engines. Writes the file that --speculative-config specbranch reads, or says why "
        "speculation does not pay."
    )
    tune.set_defaults(command=_tune)
    add("--target", type=Path, required=True, metavar="PATH", help="folder of the target model")
    add("--draft", type=Path, required=True, metavar="PATH", help="folder of the draft model, with the same tokenizer")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="like those you serve: .jsonl with id and prompt, .json list, or .txt (default: 16 of HumanEval)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="settings file to write (default: specbranch.json in the target's folder, where vLLM looks for it)",
    )
    add("--num-prompts", type=count, default=8, metavar="N", help="use the first N prompts (default 8)")
    add("--max-tokens", type=_at_least(8), default=96, metavar="N", help="new tokens per prompt (default 96)")
    add("--batch-size", type=count, default=1, metavar="N", help="requests at the same time, as you expect (default 1)")
    add("--dtype", choices=_DTYPES, default="auto", help="of both models (default: what the models say)")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of the search (default 0)")
    add("--always-write", action="store_true", help="write the best settings even if they are not worth it")
    add("--json", type=Path, metavar="FILE", help="also write all that was measured and tried to this file")
    _add_places(tune)


def _add_draft_server(server: argparse.ArgumentParser) -> None:
    count = _at_least(1)
    add = server.add_argument
    server.description = (
        "Runs a draft server on its own, for engines with draft_placement tcp://HOST:PORT. Ends on SIGTERM: it answers what is "
        "open and takes leave of its engines, which go on without drafts until they find it, or its successor, again."
    )
    server.set_defaults(command=_draft_server)
    add("--model", required=True, metavar="MODEL", help="the draft model, a folder or a hub id")
    add("--bind", required=True, metavar="tcp://HOST:PORT", help="where to listen; * is every interface, 0 any port")
    security = server.add_mutually_exclusive_group(required=True)
    security.add_argument("--keys", type=Path, metavar="DIR", help="keys made by `vllm-specbranch keys`")
    security.add_argument(
        "--insecure", action="store_true", help="no keys: whoever reaches the port can use the server"
    )
    add("--num-speculative-tokens", type=count, metavar="N", help="most draft tokens of a chunk (default 8)")
    add(
        "--dtype",
        default="auto",
        help="of the draft model; the engines' must be the same (default: what the model says)",
    )
    add("--max-model-len", type=count, metavar="N", help="longest sequence to draft for (default: the model's context)")
    add("--cores", metavar="LIST", help="CPU cores to use, such as 0-3 (default: all)")
    add("--kv-cache-gib", type=_gibibytes, metavar="GIB", help="KV cache of the draft model (default: fits the device)")
    add("--max-engines", type=count, metavar="N", help="refuse further engines beyond so many (default 256)")
    add("--max-requests", type=count, metavar="N", help="of one engine at a time; others get no drafts (default 256)")
    add("--http", metavar="HOST:PORT", help="serve /metrics, /health and /ready there, to anybody (default: nowhere)")
    add("--enforce-eager", action="store_true", help="do not compile: quicker start, slower run")
    add("--trust-remote-code", action="store_true", help="let the model bring its own code")
    add(
        "--settings",
        type=_json_object,
        default={},
        metavar="JSON",
        help='how to draft, by the keys of --speculative-config: {"policy": "specbranch", "max_branches": 4}',
    )


def _add_train_head(train: argparse.ArgumentParser) -> None:
    count = _at_least(1)
    add = train.add_argument
    train.description = (
        "Runs your pair on your prompts, records what the target accepts of each draft, and trains a small network that says so "
        "beforehand from the target's hidden states. Ends by saying whether it is worth using. Can be interrupted: started again "
        "with the same words it goes on where it was."
    )
    train.set_defaults(command=_train_head)
    add("--target", type=Path, required=True, metavar="PATH", help="folder of the target model")
    add("--draft", type=Path, required=True, metavar="PATH", help="folder of the draft model, with the same tokenizer")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the head, its report and the rounds")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="like those you serve, some hundreds: .jsonl with id and prompt, .json list, or .txt (default: 16 of HumanEval)",
    )
    add("--num-prompts", type=count, metavar="N", help="use the first N prompts (default: all)")
    add("--rounds", type=count, default=50_000, metavar="N", help="rounds to collect at least (default 50000)")
    add(
        "--num-speculative-tokens",
        type=count,
        default=8,
        metavar="N",
        help="draft tokens per round; the head is for this number (default 8)",
    )
    add("--layers", type=count, default=4, metavar="K", help="last layers of the target that it sees (default 4)")
    add(
        "--temperatures",
        type=_temperatures,
        default=[0.0, 0.8],
        metavar="LIST",
        help="each prompt is continued at each of them (default 0,0.8)",
    )
    add("--max-tokens", type=_at_least(16), default=128, metavar="N", help="new tokens per prompt (default 128)")
    add("--batch-size", type=count, default=64, metavar="N", help="requests at the same time (default 64)")
    add("--epochs", type=count, default=20, metavar="N", help="of training (default 20)")
    add(
        "--c",
        type=_between(0.1, 1000.0),
        default=5.0,
        metavar="C",
        help="draft steps that a round of the target takes, for the verdict and what the head says; tune tells it (default 5)",
    )
    add(
        "--miss-cost",
        type=_between(0.0, 1000.0),
        default=2.0,
        metavar="N",
        help="draft steps that a round takes longer after a wrong guess, for the same; c or more for on_miss go (default 2)",
    )
    add("--dtype", choices=_DTYPES, default="auto", help="of both models (default: what the models say)")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of sampling, split and training (default 0)")
    _add_places(train)


def _add_places(command: argparse.ArgumentParser) -> None:
    """Where and how large engines are, for every command that starts some."""
    count = _at_least(1)
    add = command.add_argument
    add("--target-cores", metavar="LIST", help="CPU cores of the target, such as 0-3 (default: the first one)")
    add("--draft-cores", metavar="LIST", help="CPU cores of the draft server (default: the next one)")
    add(
        "--max-model-len",
        type=count,
        default=1024,
        metavar="N",
        help="longest prompt and output together (default 1024)",
    )
    add("--kv-cache-gib", type=_gibibytes, default=0.5, metavar="GIB", help="KV cache of each target (default 0.5)")
    add("--enforce-eager", action="store_true", help="do not compile: quicker start, slower run")


if __name__ == "__main__":
    sys.exit(main())
