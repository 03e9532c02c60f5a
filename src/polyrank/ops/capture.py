"""Whether work goes into a CUDA graph."""

import torch


def capturing(device: torch.device) -> bool:
    """Say whether what is started on a device now is captured into a CUDA graph."""
    # A compiler cannot trace the question.
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()
