"""What does the orthogonality penalty cost? Closed form against autograd layer by layer, and against a training step.

    python benchmarks/penalty.py --machine cpu --threads 2 [--quick]

Per encoder and penalty, in turns: `add_gradients`, the same gradient by autograd in a plain loop over layers, and one
forward and backward pass of the encoder without a penalty. "faster" is the loop's time over ours. What has a strength
is timed by `step` instead, and compared with the loop of its penalty towards the identity. The pass is that of a small
batch; the penalty does not depend on the batch, so its share is also scaled to 512 images (256 in two views).
Targets: at most 3 % of a ResNet-18 step for SO, 0.5 % for SRIP. Writes benchmarks/results/<machine>/penalty.json.
"""

from __future__ import annotations

import torch
from common import Row, Table, build_timm, clocked, faster, medians, parser, prepare, take_turns, write
from torch import Tensor, nn

from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer

ENCODERS = ("resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224")
FORMS = {
    "so": {"penalty": "so", "weight": 1e-6},
    "srip": {"penalty": "srip", "weight": 1e-6},
    "so, strength": {"penalty": "so", "strength": 1e-6},
    "so, strength, scaled": {"penalty": "so", "strength": 1e-6, "target": "scaled"},
    "so, strength, relaxed": {"penalty": "so", "strength": 1e-6, "target": "relaxed"},
    "so, strength, start": {"penalty": "so", "strength": 1e-6, "target": "start"},
    "srip, strength, scaled": {"penalty": "srip", "strength": 1e-6, "target": "scaled"},
}
RUN_IMAGES = 512
SIDE = 32
COLUMNS = {
    "encoder": ("encoder", ""),
    "penalty": ("penalty", ""),
    "add_gradients_ms": ("ours ms", ".1f"),
    "autograd_loop_ms": ("loop ms", ".1f"),
    "times_faster": ("faster", ".2f"),
    "step_ms": ("pass ms", ".1f"),
    "share_of_step": ("share", ".1%"),
    "share_of_step_at_512_images": ("at 512", ".2%"),
}


def autograd_loop(weights: list[Tensor], penalty: str, vectors: list[Tensor]) -> None:
    """What one writes first: a Gram, a norm and a graph for each layer; for SRIP, the paper's two power iterations."""
    total = weights[0].new_zeros(())
    for weight, v in zip(weights, vectors, strict=True):
        w = weight.flatten(1)
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        m = gram - torch.eye(len(gram), device=w.device)
        if penalty == "so":
            total = total + m.pow(2).sum()
        else:
            u = m @ v
            total = total + (m @ u).norm() / u.norm()
    (1e-6 * total).backward()


def measure(name: str, form: str, images: Tensor, budget: float) -> Row:
    encoder: nn.Module = build_timm(name, SIDE).to(images.device)
    config = OrthogonalityConfig.from_dict(FORMS[form])
    regularizer = OrthogonalityRegularizer(encoder, config)
    regularizer.set_progress(0, 1_000_000)  # a step of a long run: the weights stay where they are
    weights = [encoder.get_parameter(layer) for layer in regularizer.names]
    vectors = [torch.randn(min(w.shape[0], w[0].numel()), device=images.device) for w in weights]

    def without_penalty() -> None:
        encoder(images).square().mean().backward()

    ours = regularizer.step if regularizer.decoupled else regularizer.add_gradients
    works = (ours, lambda: autograd_loop(weights, config.penalty, vectors), without_penalty)
    rounds = take_turns([clocked(work, images.device) for work in works], budget)
    penalty, loop, step = medians(rounds)
    return {
        "encoder": name,
        "penalty": form,
        "add_gradients_ms": penalty,
        "autograd_loop_ms": loop,
        "times_faster": faster(rounds, 0, 1),
        "step_ms": step,
        "step_images": len(images),
        "share_of_step": penalty / (penalty + step),
        "share_of_step_at_512_images": penalty / (penalty + step * RUN_IMAGES / len(images)),
    }


def main() -> None:
    arguments = parser(__doc__, seconds=5)
    arguments.add_argument("--batch", type=int, default=32, help="images of the pass")
    args = arguments.parse_args()
    if args.quick:
        args.batch, args.seconds = 4, 1.0
    device = prepare(args)
    images = torch.randn(args.batch, 3, SIDE, SIDE, device=device)
    table = Table(COLUMNS)
    for name in ENCODERS[::2] if args.quick else ENCODERS:
        for form in FORMS:
            table.add(measure(name, form, images, args.seconds))
    write(__file__, args, side=SIDE, rows=table.rows)


if __name__ == "__main__":
    main()
