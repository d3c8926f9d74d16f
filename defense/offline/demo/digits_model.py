"""The demo's network, as a user's `model.py`: a small residual CNN for 32x32 grey digits."""

from torch import Tensor, nn


class DigitsNet(nn.Module):
    # Nested, because TorchServe wants exactly one class in a model file.
    class Block(nn.Module):
        def __init__(self, width_in: int, width: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(width_in, width, 3, 2, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, 2, bias=False), nn.BatchNorm2d(width)
            )

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            self.Block(16, 16),
            self.Block(16, 32),
            self.Block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]
