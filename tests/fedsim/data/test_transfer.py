import numpy as np
import torch

from fedsim.data.transfer import to_device


def test_arrays_that_can_be_written_to_are_shared_and_others_copied():
    array = np.arange(3.0)
    to_device(array, torch.device("cpu"))[0] = 7
    assert array[0] == 7
    array.flags.writeable = False  # as in the memory that workers share; warnings are errors
    to_device(array, torch.device("cpu"))[1] = 8
    assert array.tolist() == [7, 1, 2]
