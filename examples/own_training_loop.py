"""Train an FPD in your own PyTorch loop: your optimizer, schedule, loader and augmentation."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import robustfpd as rf
from robustfpd.config import TrainingConfig
from robustfpd.training import OptimizerUpdate, noisy_images, parameter_groups, two_phase_step

torch.manual_seed(0)
pixels, classes = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # N C H W in [0, 1]
labels = torch.tensor(classes)
loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
augment = v2.RandomAffine(degrees=10, translate=(0.05, 0.05))

model = rf.enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8).train()
optimizer = torch.optim.AdamW(parameter_groups(model))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=4 * len(loader))
config = TrainingConfig(noise=0.1)
generator = torch.Generator().manual_seed(0)
update = OptimizerUpdate(optimizer, clip_grad_norm=10.0)

for epoch in range(4):
    for index, (batch, target) in enumerate(loader):
        clean = augment(batch)
        noisy = noisy_images(model, clean, config, generator)
        losses = two_phase_step(model, clean, noisy, target, update, config, index, generator).first
        schedule.step()
    print(f"epoch {epoch + 1}: cross-entropy {losses.ce:.3f}, restoration {losses.restoration:.3f}")

classifier = model.eval().classifier()
adversarial = rf.attacks.pgd(classifier, images[1500:], labels[1500:], eps=0.05, steps=10)
for name, x in ("clean", images[1500:]), ("PGD-10", adversarial):
    accuracy = (classifier(x).argmax(dim=1) == labels[1500:]).float().mean()
    print(f"accuracy, {name}: {accuracy:.3f}")
