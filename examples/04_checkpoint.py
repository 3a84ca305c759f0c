"""Write a checkpoint, plan its memory, load it in several storages, look inside.

python examples/04_checkpoint.py
"""

import tempfile

import kimi_linear as kl
import numpy as np

config = kl.testing.tiny_config(num_hidden_layers=8, hidden_size=96)
print("layers", [kind.split("_")[0] for kind in config.layer_types])
print("parameters", f"{config.parameter_count():,}")

with tempfile.TemporaryDirectory() as path:
    kl.testing.write_checkpoint(path, config, dtype="f32", n_files=3)  # shards and an index

    ids = list(range(60))
    want = None
    for dtype in ("f32", "bf16", "int8", "int4"):
        plan = kl.plan(path, dtype=dtype, device="cpu")  # nothing is loaded yet
        with kl.load(path, dtype=dtype, device="cpu") as model:
            logits = model.logits(ids)
        want = logits if want is None else want
        error = np.sqrt(np.mean((logits - want) ** 2) / np.mean(want**2))
        print(f"{dtype:5} weights {plan.weights:9,} bytes, logits differ by {error:.1%}")

    with kl.load(path, device="cpu") as model:
        print("\nhow the residual stream grows")
        for layer, x in model.hidden(ids, layers=range(8)).items():
            print(f"  layer {layer} {config.layer_types[layer]:17} rms {x.std():.2f}")

    print("\nwhat a wrong file says")
    with open(f"{path}/model-00002-of-00003.safetensors", "ab") as file:
        file.write(b"x")
    try:
        kl.load(path)
    except kl.WeightsError as e:
        print(" ", str(e).replace(path, "DIR"))
