"""How many cases, and which: the same few hundred in every ``make test``, 20,000 in ``make harden``.

KDKERNELS_PROPERTIES=<n> is how many each invariant tries on each backend, four times as many each definition;
``--hypothesis-seed`` says which.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

CASES = int(os.environ.get("KDKERNELS_PROPERTIES", "0"))
settings.register_profile(
    "kdkernels",
    max_examples=CASES or 2,
    derandomize=not CASES,
    deadline=None,  # a busy machine is no fault
    database=None,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    # the backend is the same for all cases of a test, and a rejected layout costs nothing
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("kdkernels")
