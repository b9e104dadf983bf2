"""ResNet-18 for 32x32 images, and a small transformer, written by hand.

    from model import make_model, resnet18
    model = resnet18()                           # 11,220,132 parameters; the same as make_model("resnet18")
    logits = model(torch.randn(8, 3, 32, 32))    # (8, 100)

He, Zhang, Ren, Sun: Deep residual learning for image recognition, arXiv:1512.03385. The paper's 7x7 convolution with
stride 2 and 3x3 max-pool are for 224x224 photographs, and would leave 8x8 of a CIFAR image; users who kept them report
about 60 % accuracy where others have 75 (github.com/weiaicunzai/pytorch-cifar100/issues/17). So, as is usual on CIFAR,
the stem here is one 3x3 convolution with stride 1, and there is no max-pool.

    stage     output
    stem      64 x 32x32  3x3 convolution
    layer1    64 x 32x32  2 basic blocks
    layer2   128 x 16x16  2 basic blocks, the first with stride 2
    layer3   256 x  8x 8  the same
    layer4   512 x  4x 4  the same
    head     100          mean over the 4x4 cells, then a linear layer

The transformer, CCT, is explained at its class. New ones: MODELS, LAST_MAP, make_model; SANITY_LAYER of gradcam.py.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(x + bn(conv(relu(bn(conv(x)))))), figure 2 of He et al."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        # No bias: the batch norm that follows subtracts the mean, and any bias with it.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:  # the sum needs equal shapes: option B of the paper, a 1x1 layer
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x):
        shortcut = self.downsample(x)
        # Never in place: a hook on a module would record what the ReLU has already overwritten.
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return F.relu(x + shortcut)


class ResNet18(nn.Module):
    """Modules are named as in torchvision, so that all of a state dict but the stem can be exchanged."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, stride=1)
        self.layer2 = stage(width, 2 * width, stride=2)
        self.layer3 = stage(2 * width, 4 * width, stride=2)
        self.layer4 = stage(4 * width, 8 * width, stride=2)
        self.fc = nn.Linear(8 * width, num_classes)

        # He et al., arXiv:1502.01852: variance 2 / fan_out keeps the gradient's scale through the ReLUs. By PyTorch's
        # defaults batch norm starts as the identity, and the linear layer uniformly within 1 / sqrt(fan_in).
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 64, 32, 32) at width 64
        x = self.layer1(x)  # (B, 64, 32, 32)
        x = self.layer2(x)  # (B, 128, 16, 16)
        x = self.layer3(x)  # (B, 256, 8, 8)
        x = self.layer4(x)  # (B, 512, 4, 4)
        x = x.mean((2, 3))  # (B, 512), as by AdaptiveAvgPool2d(1)
        return self.fc(x)  # (B, num_classes)


def stage(in_channels, channels, stride):
    """Two blocks (deeper ResNets have more), of which the first may change the size and the channels."""
    return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): T tokens of dim channels (B, T, dim) in and out.

    Vaswani et al., arXiv:1706.03762, with the norms first as in Dosovitskiy et al., arXiv:2010.11929.
    """

    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, dim / heads)
        # Row i: how much token i takes from every token. 64 tokens are few enough to keep the whole matrix.
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, T, T)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class CCT(nn.Module):
    """CCT-2/3x2, a compact convolutional transformer: 2 blocks on the 8x8 tokens that 2 convolutions leave.

    Hassani et al., arXiv:2104.05704: 0.28 M parameters with 10 classes, at width 64. Convolutions in place of patches
    let a transformer learn from 50,000 images. Unlike the authors' code: no dropout, plain pre-norm blocks, torch's
    first weights, and the mean of the tokens, not a learned average. So a logit is the mean of an 8x8 map, `tokens`
    weighted by the head, plus a bias.
    """

    def __init__(self, num_classes, width):
        super().__init__()
        dim = 2 * width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, dim, 3, padding=1, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, dim))  # learned
        self.blocks = nn.Sequential(TransformerBlock(dim), TransformerBlock(dim))
        self.norm = nn.LayerNorm(dim)
        self.tokens = nn.Identity()  # a name for the map, where Grad-CAM takes hold
        self.fc = nn.Linear(dim, num_classes)

        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2.weight)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)  # (B, 64, 16, 16) at width 64
        x = F.max_pool2d(F.relu(self.conv2(x)), 3, stride=2, padding=1)  # (B, 128, 8, 8)
        x = x.flatten(2).transpose(1, 2) + self.position  # (B, 64, 128): a token for each of the 8x8 cells
        x = self.norm(self.blocks(x))  # (B, 64, 128)
        x = self.tokens(x.transpose(1, 2).unflatten(2, (8, 8)))  # (B, 128, 8, 8)
        return self.fc(x.mean((2, 3)))  # (B, num_classes)


MODELS = {"resnet18": "ResNet-18", "cct": "CCT-2/3x2"}  # flag: name in titles
LAST_MAP = {"resnet18": "layer4", "cct": "tokens"}  # the last module that has a map


def make_model(name="resnet18", num_classes=100, width=64):
    """A network for images (B, 3, 32, 32) float32; it returns logits (B, num_classes) before the softmax.

    name: one of MODELS; ValueError otherwise. width: channels of the first convolution, 64 in the papers; 16 has about
    a 16th of the parameters. Draws from torch's global generator: torch.manual_seed first gives the same weights again.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    return CCT(num_classes, width) if name == "cct" else ResNet18(num_classes, width)


def resnet18(num_classes=100, width=64):
    return make_model("resnet18", num_classes, width)
