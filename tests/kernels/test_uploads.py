import numpy as np
import torch

from raytroupe.kernels.uploads import ALIGNMENT, Uploads

CPU = torch.device("cpu")


def test_arrays_arrive_with_their_shapes_and_dtypes():
    uploads = Uploads(CPU, capacity=64)
    arrays = {
        "a": np.arange(5, dtype=np.int32),
        "b": np.arange(6, dtype=np.float64).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype=np.int64),
        "c": np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1],
    }
    for _ in range(5):  # the last upload is not read again
        tensors = uploads(arrays)
        for name, array in arrays.items():
            assert torch.equal(tensors[name], torch.from_numpy(array.copy()))
            assert tensors[name].data_ptr() % ALIGNMENT == 0
            array += 1


def test_the_same_layout_keeps_its_place_and_another_does_not_disturb_it():
    uploads = Uploads(CPU, capacity=256)
    first = uploads({"x": np.arange(4)})
    place = first["x"].data_ptr()
    assert uploads({"x": np.arange(4, 8)}) is first
    assert first["x"].tolist() == [4, 5, 6, 7]
    assert uploads({"x": np.arange(5)})["x"].tolist() == list(range(5))
    assert uploads({"x": np.arange(4)})["x"].data_ptr() == place


def test_an_upload_larger_than_ever_before_gets_new_memory_and_the_old_stays_valid():
    uploads = Uploads(CPU, capacity=16)
    small = uploads({"x": np.arange(2)})
    large = uploads({"x": np.arange(1000)})
    assert large["x"].tolist() == list(range(1000))
    assert small["x"].tolist() == [0, 1]
