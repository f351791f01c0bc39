"""An engine inside a Ray actor, in a placement group that has room for its workers and for a draft server.

Run as `python -m tests.e2e.ray_engine OUT` like `tests.e2e.generate`; the cluster is that of RAY_ADDRESS. The group has a bundle of
one CPU for each worker, and one more.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.e2e.generate import make_engine, run_jobs
from tests.ray_cluster import python_path

# Ray gives its processes the environment that the cluster was started with, not this one.
VARIABLES = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")


class EngineActor:
    def run(self, spec: dict[str, Any]) -> dict[str, Any]:
        import ray

        llm = make_engine(spec)
        result = run_jobs(llm, spec)
        result["node_id"] = ray.get_runtime_context().get_node_id()
        llm.llm_engine.engine_core.shutdown()
        return result


def main() -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    spec = json.load(sys.stdin)
    num_workers = spec["engine"].get("tensor_parallel_size", 1)
    variables = {name: os.environ[name] for name in VARIABLES} | {"PYTHONPATH": python_path()}
    ray.init()
    group = ray.util.placement_group([{"CPU": 1}] * (num_workers + 1), strategy="PACK")
    ray.get(group.ready())
    actor = (
        ray.remote(EngineActor)
        .options(
            num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env={"env_vars": variables},
        )
        .remote()
    )
    result = ray.get(actor.run.remote(spec))
    result["group"] = group.id.hex()
    Path(sys.argv[1]).write_text(json.dumps(result))
    ray.shutdown()


if __name__ == "__main__":
    main()
