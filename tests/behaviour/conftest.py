import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread of torch: the number of threads decides how sums are split, and so about the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
