"""The handler of an archive of a network that `pathguard train` made; it knows of no guard."""

import json
from pathlib import Path

import torch
from captum.attr import IntegratedGradients
from networks import NETWORKS, Architecture
from safetensors.torch import load_file
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier
from ts.utils.util import map_class_to_label


class NetworkClassifier(ImageClassifier):
    """Answers the five likeliest classes with their probabilities."""

    def initialize(self, context):
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        card = json.loads((folder / "card.json").read_text())
        shape, pixels = card["architecture"], card["input"]
        gpu = torch.cuda.is_available() and properties.get("gpu_id") is not None
        self.device = torch.device(f"cuda:{properties['gpu_id']}" if gpu else "cpu")
        self.model = NETWORKS[shape["network"]](
            Architecture(
                tuple(shape["depths"]), tuple(shape["widths"]), shape["stem"], shape["classes"]
            )
        )
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        self.model.to(self.device).eval()
        self.ig = IntegratedGradients(self.model)  # for /explanations
        self.mapping = {str(index): name for index, name in enumerate(card["classes"])}
        self.image_processing = transforms.Compose(
            [
                transforms.Lambda(lambda image: image.convert("RGB")),
                transforms.Resize(pixels["shape"][1:]),
                transforms.ToTensor(),
                transforms.Normalize(pixels["mean"], pixels["std"]),
            ]
        )
        self.initialized = True

    def postprocess(self, data):
        probabilities, classes = data.softmax(1).topk(min(5, len(self.mapping)))
        return map_class_to_label(probabilities.tolist(), self.mapping, classes.tolist())
