from raptide.training.watching.progress import describe_state


def test_figures_appear_as_they_become_known():
    assert describe_state({"phase": "loading"}, 100) == []
    state = {"step": 40, "loss": 2.5, "step_s": 61.0, "tokens_per_s": 12345.6}
    assert describe_state(state, 100) == ["loss 2.500", "12,346 tokens/s", "1:01:00 left"]
    assert "held-out ECE 14.02" in describe_state(state | {"heldout_ece": 14.02}, 100)
