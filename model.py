"""ResNet-18 for 32x32 images, written by hand.

    from model import resnet18
    model = resnet18()                           # 11,220,132 parameters
    logits = model(torch.randn(8, 3, 32, 32))    # (8, 100)

He, Zhang, Ren, Sun: Deep residual learning for image recognition, arXiv:1512.03385. The paper's network is
made for 224x224 photographs: a 7x7 convolution with stride 2 and a 3x3 max-pool leave 56x56 of them. The same
start would leave 8x8 of a CIFAR image before the first block; users who kept it report about 60 % accuracy where
others have 75 (github.com/weiaicunzai/pytorch-cifar100/issues/17). So, as is usual on CIFAR, the stem here is one
3x3 convolution with stride 1, and there is no max-pool.

    stage     output      what
    stem      64 x 32x32  3x3 convolution
    layer1    64 x 32x32  2 basic blocks
    layer2   128 x 16x16  2 basic blocks, the first with stride 2
    layer3   256 x  8x 8  the same
    layer4   512 x  4x 4  the same
    head     100          mean over the 4x4 cells, then a linear layer
"""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(x + bn(conv(relu(bn(conv(x)))))), figure 2 of the paper."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        # No bias: the batch norm that follows subtracts the mean, and any bias with it.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride == 1 and in_channels == channels:
            self.downsample = nn.Identity()
        else:  # the sum needs equal shapes: option B of the paper, a 1x1 convolution
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        shortcut = self.downsample(x)
        # Never in place: a hook on a module would record what the ReLU has already overwritten.
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return F.relu(x + shortcut)


class ResNet18(nn.Module):
    """See resnet18() below. Modules are named as in torchvision, so that state dicts can be exchanged."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.fc = nn.Linear(8 * width, num_classes)

        # He et al., arXiv:1502.01852: variance 2 / fan_out keeps the gradient's scale through the ReLUs.
        # Batch norm starts as the identity and the linear layer uniformly within 1/sqrt(fan_in), both
        # PyTorch's defaults.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 64, 32, 32) at width 64
        x = self.layer1(x)  # (B, 64, 32, 32)
        x = self.layer2(x)  # (B, 128, 16, 16)
        x = self.layer3(x)  # (B, 256, 8, 8)
        x = self.layer4(x)  # (B, 512, 4, 4)
        x = x.mean((2, 3))  # (B, 512); unlike adaptive pooling, its backward is deterministic on CUDA
        return self.fc(x)  # (B, num_classes)


def resnet18(num_classes=100, width=64):
    """ResNet-18 for images (B, 3, H, W) float32, returning logits (B, num_classes) before the softmax.

    width: channels of the first stage, 64 in the paper; 16 has a 16th of the parameters and is for quick
    looks. Draws its weights from torch's global generator: call torch.manual_seed first to get the same ones
    again.
    """
    return ResNet18(num_classes, width)
