"""What a run does otherwise in its first step than in all others, done before a resumed run takes its first one."""

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data.generators import generator_states, set_generator_states


def arrange_buckets(model: DistributedDataParallel, images: Tensor, texts: Tensor) -> None:
    """Let DDP arrange its buckets of gradients, as it does after its first backward pass (collective).

    Three ranks and more sum a gradient in an order that depends on its place there. The weights, the running
    statistics and the random generators are afterwards what they were. images and texts: of a batch.
    """
    generators, buffers = generator_states(), [buffer.clone() for buffer in model.buffers()]
    outputs = model(images, texts).values()
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    model.zero_grad()
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    set_generator_states(generators)
