from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from serve.scaling import METRIC, TokenScaling


def decide(reported, current, target=None, requests=0):
    context = AutoscalingContext(
        deployment_id=None,
        deployment_name="replica",
        app_name="raptide",
        current_num_replicas=current,
        target_num_replicas=current if target is None else target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={METRIC: reported} if reported is not None else {},
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )
    return TokenScaling(1000)(context)[0]


def test_each_replica_gets_its_share_of_the_tokens():
    assert decide({"a": 5500}, 1) == 6
    assert decide({"a": 1500, "b": 500}, 2) == 2
    assert decide({"a": 100, "b": 0}, 2) == 1


def test_without_work_none_is_wanted_and_while_requests_run_one_is():
    assert decide({"a": 0}, 1) == 0
    assert decide({"a": 0}, 1, requests=3) == 1


def test_a_missing_number_is_not_zero():
    assert decide(None, 2) == 2
    assert decide({}, 2) == 2
    assert decide({"a": 0}, 2) == 2, "the other one has not reported yet"
    assert decide({"a": 9000}, 2) == 9


def test_a_replica_that_is_starting_is_not_stopped_again():
    assert decide({"a": 100}, 1, target=1) == 1
    assert decide({"a": 100}, 2, target=3) == 3


def test_from_zero_a_waiting_request_brings_one():
    assert decide(None, 0, requests=0) == 0
    assert decide(None, 0, requests=5) == 1


def test_the_policy_travels_to_serves_controller_by_value():
    policy = AutoscalingPolicy(policy_function=TokenScaling, policy_kwargs={"target_tokens": 7})
    shipped = AutoscalingPolicy.from_serialized_policy_def(
        policy.model_dump(), policy.get_serialized_policy_def()
    )
    assert shipped.get_policy()(**policy.policy_kwargs)._target_tokens == 7
