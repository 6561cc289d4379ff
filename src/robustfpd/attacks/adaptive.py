"""Views of a classifier that an attacker who knows the defence differentiates instead of the classifier.

Athalye et al., "Obfuscated Gradients", ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019.
What an attack finds on a view counts only if it fools the classifier itself.
"""

from __future__ import annotations

from torch import nn

from robustfpd.models import FPD, FPDClassifier

PLAIN = "logits"
UNSQUASHED = "pre-squash"


def views(classifier: nn.Module) -> dict[str, nn.Module]:
    """Return the modules to attack, by name, the classifier itself first.

    An FPD's saturated tanh hides gradients, so its logits before squashing are attacked as well.
    """
    found: dict[str, nn.Module] = {PLAIN: classifier}
    if isinstance(classifier, FPDClassifier) and classifier.squash and classifier.fpd.head.squashes:
        found[UNSQUASHED] = classifier.fpd.classifier(squash=False)
    return found


def as_classifier(model: nn.Module) -> nn.Module:
    """Return the plain images → logits module of one of our models; any other module is one already."""
    return model.classifier() if isinstance(model, FPD) else model
