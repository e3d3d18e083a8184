"""How the derivatives grow with the number of classes: a figure."""

import pathlib

import torch
from torch import func

from benchmarks.measure import paired
from softmaxlib import softmax_hessian, softmax_hvp, softmax_jacobian

PICTURE = pathlib.Path(__file__).with_name("growth.svg")


def plain(z):
    return torch.softmax(z, 0)


def each_class(z):
    """A reverse pass for each class, as tutorials do it."""
    z = z.clone().requires_grad_()
    p = plain(z)
    rows = [
        torch.autograd.grad(v, z, retain_graph=True)[0] for v in p.unbind()
    ]
    return torch.stack(rows)


def forward_over_reverse(z, u, v):
    gradient = func.grad(lambda t: torch.dot(plain(t), u))
    return func.jvp(gradient, (z,), (v,))[1]


# Title: sizes, ours, peers by name.
PANELS = {
    "Jacobian, K × K": (
        (10, 30, 100, 300, 1000),
        lambda z, u, v: softmax_jacobian(z, 0),
        {
            "jacrev": lambda z, u, v: func.jacrev(plain)(z),
            "K reverse passes": lambda z, u, v: each_class(z),
        },
    ),
    "second derivative, K × K × K": (
        (10, 30, 100, 300),
        lambda z, u, v: softmax_hessian(z, 0),
        {"hessian": lambda z, u, v: func.hessian(plain)(z)},
    ),
    "Hessian-vector product, K": (
        (10, 100, 1000, 10_000, 100_000),
        lambda z, u, v: softmax_hvp(z, u, v, 0),
        {"jvp of grad": forward_over_reverse},
    ),
}


def measure():
    """Seconds by panel, name and size."""
    found = {}
    for title, (sizes, ours, peers) in PANELS.items():
        for size in sizes:
            generator = torch.Generator().manual_seed(0)
            three = torch.randn(3, size, generator=generator)
            for name, peer in peers.items():
                ratio = paired(
                    lambda f=ours, t=three: f(*t),
                    lambda f=peer, t=three: f(*t),
                    5,
                )
                times = found.setdefault(title, {})
                times.setdefault("softmaxlib", {})[size] = ratio.ours
                times.setdefault(name, {})[size] = ratio.theirs
    return found


def draw(found):
    import matplotlib.pyplot as plt

    from softmaxlib import plotting

    plotting.use_style()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    for ax, (title, times) in zip(axes, found.items(), strict=True):
        unit = min(times["softmaxlib"].values())
        for (name, by_size), color in zip(
            times.items(), plotting.CYCLE, strict=False
        ):
            ax.plot(
                list(by_size),
                [t / unit for t in by_size.values()],
                "o-",
                color=color,
                label=name,
                markersize=4,
            )
        ax.set(xscale="log", yscale="log", xlabel="classes K", title=title)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("CPU time, ours at least = 1")
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def report() -> str:
    found = measure()
    draw(found)
    lines = [
        "## Growth with the number of classes",
        "Time of the peer over ours, from `benchmarks/growth.svg`, the "
        "figure of the chapter on the Hessian:",
    ]
    for title, times in found.items():
        ours = times["softmaxlib"]
        for name, by_size in times.items():
            if name != "softmaxlib":
                ratios = ", ".join(
                    f"{t / ours[k]:.3g} at {k:,}"
                    for k, t in by_size.items()
                )
                lines.append(f"* {title}, {name}: {ratios}.")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report())
