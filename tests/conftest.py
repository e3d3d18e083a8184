"""One thread, and the same Hypothesis examples at every run."""

import hypothesis
import torch

hypothesis.settings.register_profile(
    "book",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("book")
torch.set_num_threads(1)
