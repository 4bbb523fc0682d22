"""Examples that property tests draw: ten times as many with `--hypothesis-profile thorough`."""

from hypothesis import HealthCheck, settings

TIMES = {"ci": 1, "thorough": 10}

for profile, times in TIMES.items():
    settings.register_profile(
        profile,
        max_examples=100 * times,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
if settings.get_current_profile_name() not in TIMES:
    settings.load_profile("ci")


def examples(number):
    """Settings of a property test that draws so many examples at every change."""
    return settings(max_examples=number * TIMES[settings.get_current_profile_name()])
