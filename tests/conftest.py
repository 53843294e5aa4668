"""Settings that all tests share."""

import os

from hypothesis import settings

# Read once, when torch loads. Threads that spin at barriers make tests crawl on a machine that does other things too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")
