"""`deterministic`: the same batch with the same seeds gives the same text, however fast the machine is at the moment."""

from tests.e2e.conftest import RunEngine

NUM_PROMPTS = 12
NUM_TOKENS = 48


def test_seeded_text_repeats_itself_beside_a_busy_process(run_engine: RunEngine, prompts: list[list[int]]) -> None:
    """The second run shares its core with a busy loop; the third draws with other seeds, to show that text can differ at all."""
    sampling = [
        {"temperature": 0.0} if index % 4 == 0 else {"temperature": 1.0, "top_p": 0.95, "seed": index}
        for index in range(NUM_PROMPTS)
    ]
    other = [one | {"seed": 100} if "seed" in one else one for one in sampling]
    common = {"prompts": prompts[:NUM_PROMPTS], "max_tokens": NUM_TOKENS, "batch_size": NUM_PROMPTS}
    jobs = [
        {**common, "sampling": sampling},
        {**common, "sampling": sampling, "busy": True},
        {**common, "sampling": other, "with_status": True},
    ]
    result = run_engine(
        jobs,
        speculative={"deterministic": True},
        enable_prefix_caching=False,
        max_num_seqs=NUM_PROMPTS,
    )
    quiet, busy, different = (done["answers"] for done in result["jobs"])
    assert quiet == busy
    # A quarter is greedy, and a sure model may say the same twice.
    assert sum(one == two for one, two in zip(quiet, different, strict=True)) <= NUM_PROMPTS // 2
    engine = result["jobs"][2]["status"]["engine"]
    assert engine["num_sampled_outcomes"] > NUM_TOKENS
    assert engine["num_reply_timeouts"] == 0
