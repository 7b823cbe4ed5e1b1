"""How close an estimate of a model's weights is to the model."""
from dataclasses import dataclass
import torch
from mpunlearn.audit.alignment import align
from mpunlearn.audit.weights import Model, norm

def parameter_error(theta: Model, estimate: Model):
    al = align(theta, estimate)
    d = n = 0.0
    e16 = e32 = c = 0
    for name, value in theta.weights.items():
        t = al.tensor(estimate, name)
        d += float((t - value.double()).square().sum()); n += float(value.double().square().sum())
        e16 += int((t.float().bfloat16() == value.bfloat16()).sum()); e32 += int((t.float() == value.float()).sum()); c += value.numel()
    return (d / n) ** .5, e16 / c, e32 / c
