"""A draft server on its own whose draft steps last as long as a file says, so that a core behaves like an accelerator.

Owns nothing but the wrap around the model's forward; all else is `vllm_specbranch.standalone`. Started by `bench_shared`, as
`python benchmarks/shared_server.py PACE_FILE RECORD_FILE MODEL CORE MAX_MODEL_LEN GAMMA`; not for people.
"""

import sys
from pathlib import Path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vllm_specbranch.emulation import Observer, PaceFile, RecordFile
from vllm_specbranch.observed_draft_main import observe
from vllm_specbranch.standalone import StandaloneSettings, run


def main() -> int:
    """Serve until told to end; says on standard output when it is ready, and where."""
    pace, records, model, core, max_model_len, gamma = sys.argv[1:]
    observe(Observer(PaceFile(Path(pace)).read, RecordFile(Path(records))))
    draft: dict[str, object] = {
        "model": model,
        "num_speculative_tokens": int(gamma),
        "max_model_len": int(max_model_len),
        "draft_cpu_cores": core,
        # How long a step computes is hidden by how long it is stretched to.
        "enforce_eager": True,
    }
    return run(StandaloneSettings("tcp://127.0.0.1:0", None, draft, "float32"), _say)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
