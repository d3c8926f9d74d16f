"""The files that users put into their archives: networks, handlers, configurations."""

from __future__ import annotations

NETWORK = '''
from torch import nn


class Net(nn.Module):
    """A small residual network for colour images of any size."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv1 = nn.Conv2d(width, width, 3, padding=1)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.conv2(self.relu(self.conv1(x))) + x)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 2, 1)
        self.act = nn.ReLU()
        self.block = self.Block(12)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(192, 10)

    def features(self, x):
        return self.pool(self.block(self.act(self.stem(x)))).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))
'''

_HEAD = """
import io
import os

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import to_tensor
from ts.torch_handler.base_handler import BaseHandler
from ts.torch_handler.vision_handler import VisionHandler

TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
"""

PREPROCESS = (
    _HEAD
    + """

class Handler(BaseHandler):
    def preprocess(self, data):
        bodies = [row.get("data") or row.get("body") for row in data]
        return torch.stack([TENSOR(Image.open(io.BytesIO(body))) for body in bodies])
"""
)

EXPORTED = (
    _HEAD
    + """

class Handler(BaseHandler):
    def initialize(self, context):
        folder, model = context.system_properties["model_dir"], context.manifest["model"]
        self.device = torch.device("cpu")
        self.model = torch.export.load(os.path.join(folder, model["serializedFile"])).module()
        self.initialized = True

    def preprocess(self, data):
        bodies = [row.get("data") or row.get("body") for row in data]
        return torch.stack([TENSOR(Image.open(io.BytesIO(body))) for body in bodies])
"""
)

_VISION = (
    _HEAD
    + """

class Handler(VisionHandler):
    image_processing = TENSOR
"""
)

INFERENCE = (
    _VISION
    + """
    def inference(self, data):
        with torch.inference_mode():
            return self.model(data).softmax(1)
"""
)

POSTPROCESS = (
    _VISION
    + """
    def postprocess(self, logits):
        for row in range(len(logits)):
            self.context.set_response_header(row, "X-Class", str(int(logits[row].argmax())))
        return [{"class": int(row.argmax()), "logit": float(row.max())} for row in logits]
"""
)

HANDLE = (
    _HEAD
    + """
from model import Net


class Handler:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        weights = os.path.join(folder, context.manifest["model"]["serializedFile"])
        self.net = Net()
        self.net.load_state_dict(torch.load(weights))
        self.net.eval()

    def handle(self, data, context):
        bodies = [row.get("data") or row.get("body") for row in data]
        with torch.no_grad():
            logits = self.net(torch.stack([TENSOR(Image.open(io.BytesIO(b))) for b in bodies]))
        return [{"logits": row} for row in logits.tolist()]
"""
)

FUNCTION = (
    _HEAD
    + """
from function_net import Net

net = None


def ENTRY(data, context):
    global net
    if data is None:
        folder = context.system_properties["model_dir"]
        net = Net()
        net.load_state_dict(torch.load(os.path.join(folder, "model.pt")))
        net.eval()
        return None
    bodies = [row.get("data") or row.get("body") for row in data]
    with torch.inference_mode():
        return net(torch.stack([TENSOR(Image.open(io.BytesIO(b))) for b in bodies])).tolist()
"""
)

FIVE_CROPS = (
    _HEAD
    + """

class Handler(VisionHandler):
    image_processing = transforms.Compose([
        transforms.FiveCrop(28),
        transforms.Lambda(lambda crops: torch.stack([TENSOR(crop) for crop in crops])),
    ])

    def inference(self, data):
        with torch.inference_mode():
            return self.model(data.flatten(0, 1)).unflatten(0, data.shape[:2]).mean(1)
"""
)

CROPS_BY_REQUEST = FIVE_CROPS.replace(
    "return self.model(data.flatten(0, 1)).unflatten(0, data.shape[:2]).mean(1)",
    "return torch.stack([self.model(crops).mean(0) for crops in data])",
)

MIRRORED_CALLS = (
    _VISION
    + """
    def inference(self, data):
        with torch.inference_mode():
            return (self.model(data) + self.model(data.flip(-1))) / 2
"""
)

MIRRORED_BATCH = (
    _VISION
    + """
    def inference(self, data):
        with torch.inference_mode():
            both = self.model(torch.cat([data, data.flip(-1)]))
        return both.unflatten(0, (2, -1)).mean(0)
"""
)

ONE_RUN_PER_REQUEST = (
    _VISION
    + """
    def inference(self, data):
        with torch.inference_mode():
            return torch.cat([self.model(image[None]) for image in data])
"""
)

ONE_REQUEST_AT_A_TIME = (
    _HEAD
    + """

class Handler(BaseHandler):
    def preprocess(self, data):
        body = data[0].get("data") or data[0].get("body")
        return TENSOR(Image.open(io.BytesIO(body)))[None]

    def postprocess(self, logits):
        return [logits[0].tolist()]
"""
)

NAMED = (
    _VISION
    + """
    def postprocess(self, logits):
        from wording import phrase
        from wording_helper import shout

        return [shout(phrase(self.mapping[str(int(row.argmax()))], row)) for row in logits]
"""
)

WORDING = """
def phrase(name, row):
    return f"{name}: {float(row.max())!r}"
"""

WORDING_HELPER = """
def shout(text):
    return text + "!"
"""

REQUIRING = (
    _VISION
    + """
    def postprocess(self, logits):
        from pathguard_test_wording import phrase

        return [phrase(row) for row in logits]
"""
)

REQUIRED = """
def phrase(row):
    return f"class {int(row.argmax())}, logit {float(row.max())!r}"
"""

VISION = _VISION

COMPILED = "pt2: {compile: {enable: True, backend: BACKEND}}\n"

STREAMING = (
    _VISION
    + """
    def postprocess(self, logits):
        from ts.handler_utils.utils import send_intermediate_predict_response

        send_intermediate_predict_response(["..."], self.context.request_ids, "ok", 200, self.context)
        return logits.tolist()
"""
)

ASYNCHRONOUS = (
    _VISION
    + """
    async def handle(self, data, context):
        return super().handle(data, context)
"""
)

TWO_MODELS = (
    _VISION
    + """
    def initialize(self, context):
        super().initialize(context)
        self.first, self.second = self.model, type(self.model)()
        self.model = None
"""
)

RANDOM_VIEWS = (
    _VISION
    + """
    def inference(self, data):
        with torch.inference_mode():
            moved = data.roll(int(torch.randint(1, 16, ())), -1)
            return (self.model(data) + self.model(moved)) / 2
"""
)
