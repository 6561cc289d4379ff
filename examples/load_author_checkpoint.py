"""Load one of the authors' checkpoints, compare logits and restored images, and save it as a robustfpd model.

python examples/load_author_checkpoint.py bestmodel_params.pkl OUT_FOLDER
"""

import sys

import torch

import robustfpd as rf

path, out = sys.argv[1:3]
model = rf.load_published(path)  # reads weights only; code in the file is not executed
print(f"{type(model).__name__} for {model.task}")
images = torch.rand(2, model.task.in_channels, *model.task.image_size, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model.classifier()(images)  # images in [0, 1] → logits
print(f"predicted classes {logits.argmax(dim=1).tolist()}")
model.save(out)
print(f"same logits after loading: {torch.equal(rf.load(out).classifier()(images), logits)}")
