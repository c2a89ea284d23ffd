"""The fixed parts of a dumped file. They are the text of a program, and are not run here."""

HELPERS = '''
def tensor(number, size, stride, dtype, device, bound=None, parameter=False):
    """Random values in the recorded layout. Integers are below `bound`, or mostly 1, as in a mask."""
    generator = torch.Generator().manual_seed(number)
    length = 1 + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else 0
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(length, generator=generator)
        if len(size) == 1:
            values = 1 + 0.1 * values  # weights of norms and variances are near 1
        elif parameter and len(size) > 1 and all(size):
            values = values * (size[0] / torch.Size(size).numel()) ** 0.5  # unit gain
    elif bound is None:
        values = torch.rand(length, generator=generator) > 0.1
        if length:
            values[:: max(stride[-1] * size[-1], 1) if size else 1] = True
    elif len(size) == 1:
        values = torch.arange(length) % bound  # as positions: no index twice while that can be
    else:
        values = torch.randint(bound, (length,), generator=generator)
    return torch.as_strided(values.to(dtype).to(device), size, stride)
'''

CALL_BODY = '''

def call_body(body, *args, **checkpoint_options):
    """Activation checkpointing changes what is kept for the backward pass, not what is computed."""
    return body(*args)
'''

MAIN = '''
def run():
    """The outputs of the graph."""
    torch.manual_seed(0)
    with torch.no_grad():
        return Graph()(*inputs())


def describe(value):
    """One line: dtype, shape, strides and a checksum."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    numbers = value.detach().to(torch.complex128 if value.is_complex() else torch.float64).abs().flatten()
    weights = 1 + torch.arange(numbers.numel(), device=numbers.device) % 97 / 97  # so that order counts
    finite = (numbers * weights)[numbers.isfinite()]
    return (
        f"{value.dtype} {tuple(value.shape)} strides {tuple(value.stride())} "
        f"checksum {finite.sum().item():.9e} not finite {numbers.numel() - finite.numel()}"
    )


if __name__ == "__main__":
    for index, output in enumerate(run()):
        print(f"output {index}: {describe(output)}")
'''
