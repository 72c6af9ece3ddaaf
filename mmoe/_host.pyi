from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

def blend(counts: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
def permute(index: ArrayLike, size: int, key: int) -> NDArray[np.int64]: ...
def pack(tokens: ArrayLike, images: ArrayLike, max_tokens: int, max_images: int) -> NDArray[np.int32]: ...
def sva_projected_launch(
    heads: int, width: int, element_bytes: int, aligned: bool, keys: int
) -> dict[str, int | bool]: ...
def router_forward_launch(
    tokens: int, columns: int, aligned: bool, multiprocessors: int, shared_limit: int
) -> dict[str, int]: ...
def router_backward_launch(tokens: int, columns: int, multiprocessors: int) -> dict[str, int]: ...
def sva_absorbed_layout(
    encoders: list[tuple[int, int, bool]],
    heads: int,
    element_bytes: int,
    aligned: bool,
    backward: bool,
    most: int,
    preferred: int,
) -> dict[str, Any]: ...
