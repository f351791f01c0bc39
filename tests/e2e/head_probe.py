"""What the tests of the length head do inside a target worker, by `collective_rpc`: watch its features, change its head."""

from typing import Any

from tests.feature_reference import Record


def watch_features(worker: Any) -> None:
    """Keep what the length head sees in each step from now on."""
    drafter, batch = worker.model_runner.drafter, worker.model_runner.input_batch
    records: list[Record] = []
    worker.features = records

    def observe(names: list[str], num_tokens: list[int], z: Any) -> None:
        for name, count, row in zip(names, num_tokens, z.tolist(), strict=True):
            tokens = batch.token_ids_cpu[batch.req_id_to_index[name], :count].tolist()
            records.append((name, tokens, drafter.scorer.num_scheduled(name), row))

    drafter.feature_observer = observe


def watched_features(worker: Any) -> list[Record]:
    """What was kept; stop watching."""
    worker.model_runner.drafter.feature_observer = None
    records: list[Record] = worker.features
    return records


def change_head(worker: Any, folder: str) -> None:
    """Take another head, on the rank that has one."""
    from vllm_specbranch.length_head import load_head

    head = worker.model_runner.drafter._head
    if head._head is not None:
        head._head = load_head(folder)[0]
