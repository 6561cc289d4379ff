"""Evaluate any PyTorch classifier: is it robust, and is the measurement reliable?

python examples/evaluate_my_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import robustfpd as rf

# Replace these lines by your own model and images: N×C×H×W in [0, 1], with integer labels N.
pixels, classes = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
labels = torch.from_numpy(classes).long()
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(300):
    batch = torch.randint(0, 1500, (64,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

record = rf.evaluate(model.eval(), (images[1500:1564], labels[1500:1564]), suite="quick", eps=(0.05, 0.1))
print(f"clean accuracy {record.clean}")
for worst in record.worst_case:
    print(f"robust accuracy at eps {worst.eps} {worst.robust}")
print(record.headline)
print(f"is the model robust? {record.robustness.level}")
print(f"is the measurement reliable? {record.verdict.status}")
for reason in record.verdict.reasons:
    print(f"- {reason}")
