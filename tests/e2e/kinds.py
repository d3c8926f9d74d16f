"""Archives of the kinds that users have, each around a small network for the demo's digits."""

from __future__ import annotations

COUNTING_MODEL = '''
import torch
from torch import nn


class Counting(nn.Module):
    """Counts its forward passes, so that a test can see how many a batch took."""

    def __init__(self):
        super().__init__()
        from defense.offline.demo.digits_model import DigitsNet

        self.net = DigitsNet()
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return self.net(x)
'''

CLASS_HANDLER = """
import io

import torch
from captum.attr import IntegratedGradients
from PIL import Image
from torchvision import transforms
from ts.torch_handler.base_handler import BaseHandler


class OwnPreprocessing(BaseHandler):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    def preprocess(self, data):
        bodies = [row.get("data") or row.get("body") for row in data]
        images = [
            torch.tensor(body) if isinstance(body, list)
            else self.transform(Image.open(io.BytesIO(body)))
            for body in bodies
        ]
        return torch.stack(images).to(self.device)

    def postprocess(self, logits):
        for row in range(len(logits)):
            self.context.set_response_header(row, "X-Forwards", str(self.model.forwards))
            self.context.set_response_header(row, "X-Batch", str(len(logits)))
        return [
            {"class": int(row.argmax()), "probabilities": row.softmax(0).tolist()} for row in logits
        ]

    def get_insights(self, batch, _, target=0):
        return IntegratedGradients(self.model).attribute(batch, target=target, n_steps=8).tolist()
"""

FUNCTION_HANDLER = """
import io
import os

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from function_model import Net

model = None


def handle(data, context):
    global model
    if data is None:
        folder = context.system_properties["model_dir"]
        weights = os.path.join(folder, context.manifest["model"]["serializedFile"])
        model = Net()
        model.load_state_dict(torch.load(weights))
        model.eval()
        return None
    images = [to_tensor(Image.open(io.BytesIO(row.get("data") or row.get("body")))) for row in data]
    with torch.inference_mode():
        logits = model(torch.stack(images) * 2 - 1)
    return [{"class": int(row.argmax()), "logits": row.tolist()} for row in logits]
"""

FUNCTION_MODEL = """
from defense.offline.demo.digits_model import DigitsNet


class Net(DigitsNet):
    pass
"""

CLASSIFIER_MODEL = '''
from torch import nn


class Small(nn.Sequential):
    """A plain convolutional network for the built-in image_classifier: 224x224 colour images."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
        )
'''
