"""The demo's handler, as a user would write one after TorchServe's own digit example."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class DigitsClassifier(ImageClassifier):
    image_processing = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    )

    def postprocess(self, data):
        return data.argmax(1).tolist()
