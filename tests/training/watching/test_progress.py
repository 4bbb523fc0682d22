from raptide.training.watching.progress import MOST_WARNINGS, Board, describe_state


def test_figures_appear_as_they_become_known():
    assert describe_state({"phase": "loading"}, 100) == []
    state = {"step": 40, "loss": 2.5, "step_s": 61.0, "tokens_per_s": 12345.6}
    assert describe_state(state, 100) == ["loss 2.500", "12,346 tokens/s", "1:01:00 left"]
    assert "held-out ECE 14.02" in describe_state(state | {"heldout_ece": 14.02}, 100)


def test_warnings_are_told_once_and_take_no_more_room_in_the_end():
    board, told = Board(), []
    for number in range(3 * MOST_WARNINGS):
        board.warn(str(number))
        if number % 7 == 0:
            told += board.read(len(told))[1]
    told += board.read(len(told))[1]
    assert told == [str(number) for number in range(3 * MOST_WARNINGS)]
    assert board.read()[1] == told[-MOST_WARNINGS:]
    assert board.read(len(told))[1] == []


def test_a_worker_that_wakes_too_late_takes_no_answer_from_its_successors():
    board = Board()
    board.sent("000002-b", "step-4", 0, {"a": "1"}, None)
    board.sent("000001-a", "step-9", 1, {}, None)
    assert board.answers("000002-b", "step-4") == {0: ({"a": "1"}, None)}
    board.sent("000002-b", "step-8", 0, {}, None)
    assert board.answers("000002-b", "step-4") == {}
