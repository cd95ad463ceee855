"""A collected study that was never run: sizes x lengths x seeds with a law in their losses, for the report's tests."""

import math

from PIL import Image, ImageDraw

SIZES = {"nano": 462_000, "micro": 1_420_000, "mini": 3_900_000, "small": 11_300_000, "base": 29_000_000}


def study(*, sizes=("nano", "micro", "mini", "small"), epochs=(3, 6, 12), seeds=(0, 1), pictures=None, losses=()):
    """The JSON of `livt study collect`. pictures: a folder for one PNG a run; losses: an axis of loss functions."""
    axes = {"size": list(sizes), "epochs": list(epochs), "seed": list(seeds)}
    if losses:
        axes["loss"] = list(losses)
    runs = [
        one(size, length, seed, pictures, loss=loss)
        for size in sizes for length in epochs for seed in seeds for loss in (losses or [None])
    ]  # fmt: skip
    xs = [SIZES[sizes[0]] * 1.15**k for k in range(40) if SIZES[sizes[0]] * 1.15**k < 1.5 * SIZES[sizes[-1]]]
    band = {"x": xs, "mid": [loss_at(x, epochs[-1]) for x in xs], "at": {"epochs": epochs[-1]}}
    band |= {"low": [0.97 * y for y in band["mid"]], "high": [1.03 * y for y in band["mid"]]}
    held = [r for r in runs if r["axes"]["size"] == sizes[-1] and r["measures"]]
    fit = {
        "measure": "reconstruction_loss", "over": ["num_weights", "epochs"], "law": "L = E + A·N^−α + B·D^−β",
        "parameters": {"E": 0.31, "A": 12.0, "alpha": 0.34, "B": 0.42, "beta": 0.51},
        "intervals": {"E": [0.28, 0.34], "A": [8.0, 17.0], "alpha": [0.3, 0.38], "B": [0.3, 0.5], "beta": [0.4, 0.6]},
        "num_points": len(runs) - len(held), "band": {"size": band}, "problem": "",
        "held_out": {"who": sizes[-1], "points": [
            {"name": r["name"], "predicted": p, "low": 0.97 * p, "high": 1.03 * p,
             "measured": r["measures"]["reconstruction_loss"],
             "relative_error": p / r["measures"]["reconstruction_loss"] - 1}
            for r in held for p in [loss_at(r["num_weights"], r["axes"]["epochs"])]]},
    }  # fmt: skip
    none = {"measure": "top1_all", "over": ["num_weights"], "problem": "4 points for 3 constants are too few"}
    return {
        "format": "livt-study", "version": 1, "name": "sizes", "recipe": "recipes/fashion_mnist_lt/claims.yaml",
        "axes": axes, "study": "sizes.yaml", "folder": "runs/studies/sizes", "command": "livt study submit sizes.yaml",
        "versions": {"livt_scale": "0.1.0", "torch": "2.14.1", "python": "3.11.9"}, "runs": runs, "fits": [fit, none],
    }  # fmt: skip


def loss_at(weights, epochs):
    return 0.31 + 12 * weights**-0.34 + 0.42 * epochs**-0.51


def one(size, epochs, seed, pictures, *, loss=None):
    name = f"{size}-{epochs}-epochs-seed-{seed}" + (f"-{loss}" if loss else "")
    jitter = math.sin(7 * seed + epochs + len(size)) * 0.01
    final = loss_at(SIZES[size], epochs) + jitter / 3
    top1 = 0.95 - 0.6 * final + jitter + (0.02 if loss == "bal_bce" else 0)
    run = {
        "name": name, "state": "done", "why": "", "folder": f"runs/studies/sizes/{name}", "picture": None,
        "axes": {"size": size, "epochs": epochs, "seed": seed} | ({"loss": loss} if loss else {}),
        "num_weights": SIZES[size], "num_images": 14886, "flops": 6.0 * SIZES[size] * 49 * 14886 * epochs,
        "measures": {"reconstruction_loss": final, "top1_all": top1, "top1_many": top1 + 0.14,
                     "top1_medium": top1 + 0.02, "top1_few": top1 - 0.2, "ece": 0.06 + jitter},
        "minutes": {"pretrain": epochs * SIZES[size] ** 0.5 / 900, "finetune": SIZES[size] ** 0.5 / 1500},
        "curves": {
            "pretrain": [[e, final + 0.5 * math.exp(-3 * e / epochs)] for e in range(1, epochs + 1)],
            "finetune": [[e, 0.2 + 0.6 * math.exp(-e / 3)] for e in range(1, 9)],
            "evaluations": [[e, top1 - 0.3 * math.exp(-e / 2)] for e in range(1, 9)],
        },
    }  # fmt: skip
    if pictures is not None:
        run["picture"] = str(pictures / f"{name}.png")
        reconstruction(seed + epochs).save(run["picture"])
    return run


def reconstruction(number):
    """Three rows of eight noisy shirts: as hard to compress as a real one."""
    image = Image.effect_noise((8 * 84, 3 * 84), 40 + number % 7).convert("RGB")
    draw = ImageDraw.Draw(image)
    for k in range(8):
        draw.polygon([(k * 84 + 20, 10), (k * 84 + 64, 10), (k * 84 + 60, 74), (k * 84 + 24, 74)], fill=(120, 120, 130))
    return image


def fail(run, *, why, state="failed"):
    """The run as one that did not end well."""
    run.update(state=state, why=why, measures={}, minutes={}, flops=None, picture=None)
    run["curves"] = {"pretrain": run["curves"]["pretrain"][:2]}
