"""models.py: the networks against counts and values worked by hand; the settings that search and evaluate share."""
import argparse
import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import evaluate
import models
import search
from cell import Cell, Site
import training
from models import Block, MiniGPT, ResNet20, ViTTiny, build
from training import Training, configure, learning_rate, options

ROOT = Path(models.__file__).resolve().parent
SCRIPTS = {script.__name__: (script.Config, script.PRESETS, script.main) for script in (search, evaluate)}


def weights(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet20_has_269722_weights():
    """He et al.'s ResNet20 with shortcuts that have no parameters: 3x3 kernels, two numbers a channel of each norm."""
    first = 9 * 3 * 16 + 2 * 16
    stages = (6 * (9 * 16 * 16 + 2 * 16), 9 * 16 * 32 + 5 * 9 * 32 * 32 + 6 * 2 * 32,
              9 * 32 * 64 + 5 * 9 * 64 * 64 + 6 * 2 * 64)
    assert first + sum(stages) + 64 * 10 + 10 == 269_722 == weights(build('resnet20', nn.ReLU))


def test_vit_tiny_weights():
    """ViT-Ti: width 192, 12 blocks, multilayer perceptrons of 768; 64 patches of 4x4 and the class token."""
    block = 2 * (2 * 192) + (192 * 576 + 576) + (192 * 192 + 192) + (192 * 768 + 768) + (768 * 192 + 192)
    patches = 4 * 4 * 3 * 192 + 192
    total = patches + 192 + 65 * 192 + 12 * block + 2 * 192 + 192 * 10 + 10
    assert total == 5_362_762 == weights(build('vit_tiny', nn.GELU))


def test_minigpt_weights():
    """Three blocks without biases but in the layer norms; the output layer is the embedding and counts once."""
    block = 2 * (2 * 192) + 192 * 576 + 192 * 192 + 2 * 192 * 768
    model = build('minigpt', nn.GELU)
    assert 256 * 192 + 128 * 192 + 3 * block + 2 * 192 == 1_403_520 == weights(model)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize('name, sites', [('resnet20', 19), ('vit_tiny', 12), ('minigpt', 3), ('toy', 1)])
def test_number_of_sites(name, sites):
    """Every activation of a network is a site of the cell: none is left out, none made and forgotten."""
    cell = Cell(points=64)
    model = build(name, cell.site)
    assert cell.sites == sites == sum(isinstance(m, Site) for m in model.modules())


def test_option_a_shortcut():
    """With the residual branch silenced a block is its shortcut: every second pixel, and zeros for the new channels."""
    block = Block(nn.Identity, inputs=2, outputs=5, stride=2).eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.arange(2 * 2 * 4 * 4.0).view(2, 2, 4, 4)
    y = block(x)
    assert y.shape == (2, 5, 2, 2)
    for n in range(2):
        for channel in range(5):
            for i in range(2):
                for j in range(2):
                    assert y[n, channel, i, j] == (x[n, channel, 2 * i, 2 * j] if channel < 2 else 0)


def test_block_activation_comes_last():
    """The paper's ResNet applies the activation after the sum, so a block's output is one of the activation."""
    block = Block(nn.Sigmoid, 3, 3, 1).eval()
    y = block(10 * torch.randn(2, 3, 4, 4))
    assert 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('side', [8, 16, 20, 32])
def test_images_of_several_sizes(channels, side):
    """1 or 3 channels, any side that the patch divides; as many logits as classes."""
    x = torch.randn(2, channels, side, side)
    assert ResNet20(nn.ReLU, classes=7, channels=channels)(x).shape == (2, 7)
    assert ViTTiny(nn.GELU, classes=7, channels=channels, side=side).eval()(x).shape == (2, 7)


def test_vit_tiny_refuses_what_it_cannot_cut():
    """A side that the patch does not divide, and images of another side than the network was built for."""
    for side in 30, 2, 0:
        with pytest.raises(ValueError, match=f'side {side} cannot be cut into patches of 4'):
            build('vit_tiny', nn.GELU, side=side)
    with pytest.raises(ValueError, match='images of 16x16 for a vit_tiny built with side=32'):
        build('vit_tiny', nn.GELU)(torch.zeros(1, 3, 16, 16))


def test_vit_tiny_reads_each_patch():
    """Each patch of the image reaches the logits, whatever its place."""
    torch.manual_seed(0)
    model, x = ViTTiny(nn.GELU, side=8).eval(), torch.randn(1, 3, 8, 8, requires_grad=True)
    gradient, = torch.autograd.grad(model(x)[0, 0], x)
    assert (gradient.abs().view(3, 2, 4, 2, 4).sum((0, 2, 4)) > 0).all()


def test_minigpt_does_not_see_the_future():
    """Logits up to a token stay as they are when later tokens change; from that token on they do change."""
    torch.manual_seed(0)
    model = MiniGPT(nn.GELU, context=32).eval()
    x = torch.randint(256, (3, 32))
    changed = x.clone()
    changed[:, 20:] = (x[:, 20:] + 1 + torch.randint(255, (3, 12))) % 256
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-6)
    assert ((before[:, 20:] - after[:, 20:]).abs().amax((0, 2)) > 1e-3).all()
    torch.testing.assert_close(model(x[:, :7]), before[:, :7], rtol=0, atol=1e-5)  # a shorter text, the same logits


def test_minigpt_refuses_long_texts():
    """A text longer than the context is an error in words, not an index out of range."""
    with pytest.raises(ValueError, match='33 tokens for a minigpt built with context=32'):
        MiniGPT(nn.GELU, context=32)(torch.zeros(1, 33, dtype=torch.long))


def test_minigpt_dropout_in_training_only():
    """--dropout reaches the network, and evaluation is free of it."""
    torch.manual_seed(0)
    model, x = MiniGPT(nn.GELU, context=16, dropout=0.3), torch.randint(256, (2, 16))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize('relaxed', [False, True])
def test_channels_last_is_kept(relaxed):
    """From the first convolution to the last block nothing falls back to the slower layout, relaxed cell or not."""
    cell = Cell(points=64, normalise='scale')
    model = ResNet20(cell.site if relaxed else nn.ReLU)
    cell.draw()
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or module is model.act or isinstance(module, Block):
            module.register_forward_hook(lambda m, inputs, out: seen.append(
                out.is_contiguous(memory_format=torch.channels_last)))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(seen) == 19 + 19 + 1 + 9 and all(seen)


@pytest.mark.parametrize('name', ['resnet20', 'vit_tiny', 'minigpt', 'toy'])
def test_initial_weights_do_not_depend_on_the_activation(name):
    """The pairing of evaluate.py rests on it: one seed, the same initial weights whatever stands in the sites."""
    def initial(activation):
        torch.manual_seed(5)
        return build(name, activation).state_dict()
    one, two = initial(nn.ReLU), initial(lambda: evaluate.Activation('mix(scale(x, 2), const(1))'))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_teacher_and_student():
    """They share the first layer, which stays as it is and shows N(0, 1) to the activation; a student with the same
    last layer and activation is the teacher."""
    torch.manual_seed(0)
    teacher, student = models.teacher_and_student(nn.SiLU, nn.SiLU, inputs=16, hidden=64)
    assert not any(p.requires_grad for p in [*teacher.parameters(), *student.first.parameters()])
    x = torch.randn(4000, 16)
    assert (teacher.first(x).std(0) - 1).abs().max() < 0.06 and teacher.first(x).mean().abs() < 0.02
    student.last.load_state_dict(teacher.last.state_dict())
    assert torch.equal(student(x), teacher(x))


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match='did you mean resnet20'):
        build('resnet2', nn.ReLU)


# ---------------------------------------------------------------------------------------------------------------------
# Settings.

@pytest.mark.parametrize('step, settings, expected', [
    (0, dict(), 2.0), (99, dict(), 2.0),                                          # constant
    (0, dict(warmup=10), 0.2), (4, dict(warmup=10), 1.0), (10, dict(warmup=10), 2.0),
    (4, dict(warmup=0.1), 1.0),                                                   # a share of the steps
    (0, dict(lr_end=0.0), 2.0), (50, dict(lr_end=0.0), 1.0), (25, dict(lr_end=0.0), 1 + math.sqrt(0.5)),
    (50, dict(lr_end=0.1), 1.1), (99, dict(lr_end=0.0), 2 * 0.000246720),          # (1 + cos(0.99 pi)) / 2
    (49, dict(drops='0.5,0.75'), 2.0), (50, dict(drops='0.5,0.75'), 0.2), (75, dict(drops='0.5,0.75'), 0.02),
    (50, dict(drops='0.5', lr_end=0.0), 0.1)])
def test_learning_rate_by_hand(step, settings, expected):
    """Warm-up, cosine and drops at steps where their values are known."""
    config = Training(**{**dict(steps=100, lr=2.0, lr_end=1.0, warmup=0.0, drops=''), **settings})
    assert learning_rate(step, config) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_leaves_vectors_alone():
    """AdamW with gradient 0: matrices shrink by lr * weight_decay, biases and learned scalars do not."""
    matrix, vector, scalar = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), ()))
    optimizer = training.weight_optimizer([matrix, vector, scalar], Training(optimizer='adamw', lr=0.1, weight_decay=0.5))
    for p in matrix, vector, scalar:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert vector.tolist() == [1, 1] and scalar.item() == 1


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('preset', ['laptop', 'paper'])
@pytest.mark.parametrize('model', ['resnet20', 'vit_tiny', 'minigpt', 'toy'])
def test_every_preset_is_complete(script, preset, model):
    """All of them name fields that exist and values that pass their own checks."""
    kind, presets, _ = SCRIPTS[script]
    config = configure(kind, presets, dict(model=model, preset=preset, device='cpu'))
    assert (config.model, config.preset) == (model, preset)


def test_command_line_beats_preset_beats_default():
    """The three layers of settings, one field for each."""
    presets = {'laptop': {'toy': dict(data='cifar10_16', lr=0.5, steps=33)}}
    parser = argparse.ArgumentParser()
    given, _ = options(evaluate.Config, parser, ['--model', 'toy', '--steps', '44', '--device', 'cpu'])
    config = configure(evaluate.Config, presets, given)
    default = evaluate.Config()
    assert config.steps == 44 and config.lr == 0.5 and config.batch_size == default.batch_size
    assert 44 not in (33, default.steps) and default.lr != 0.5


def test_options_keep_their_types():
    """Numbers become numbers, flags can be said no to, and 'none' is None."""
    parser = argparse.ArgumentParser()
    given, _ = options(search.Config, parser, ['--lr', '1e-2', '--batch-size', '7', '--warm-alphas', '--clip', 'none'])
    assert given == {'lr': 0.01, 'batch_size': 7, 'warm_alphas': True, 'clip': None}
    given, _ = options(search.Config, argparse.ArgumentParser(), ['--no-warm-alphas', '--clip', '3'])
    assert given == {'warm_alphas': False, 'clip': 3.0}


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_option(script, capsys):
    """Every field of the dataclass is an option, with a word on what it does."""
    kind, _, main = SCRIPTS[script]
    with pytest.raises(SystemExit) as caught:
        main(['--help'])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for f in dataclasses.fields(kind):
        assert f"--{f.name.replace('_', '-')}" in text
        assert len(f.metadata['help']) > 5, f'--{f.name} is not explained'


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_setting_is_used(script):
    """An option that nothing reads is a lie. Looks for `config.name` in the source; the checks say `self.name`."""
    used = set()
    for name in {'models_own', 'training', 'run', script} | ({'runoff'} if script == 'search' else set()):
        tree = ast.parse((ROOT / f'{name}.py').read_text(encoding='utf-8'))
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                 and 'config' in ast.unparse(node.value)}
    unused = {f.name for f in dataclasses.fields(SCRIPTS[script][0])} - used
    assert unused <= {'preset'}  # read by `configure`, before there is a config


@pytest.mark.parametrize('given, word', [
    (dict(model='resnet2'), 'did you mean resnet20'), (dict(preset='papr'), 'did you mean paper'),
    (dict(data='cifar1'), 'did you mean cifar10'), (dict(device='cudda'), 'did you mean cuda'),
    (dict(optimizer='adam'), 'did you mean adamw'), (dict(batch_size=0), '--batch-size 0'),
    (dict(lr=math.nan), '--lr nan'),
    (dict(dropout=1.0), '--dropout 1.0'), (dict(drops='half'), "--drops 'half'"), (dict(steps=-3), '--steps -3')])
@pytest.mark.parametrize('script', SCRIPTS)
def test_impossible_settings(script, given, word):
    """One line that names the option, the value, and the nearest valid one."""
    kind, presets, _ = SCRIPTS[script]
    with pytest.raises(ValueError) as caught:
        configure(kind, presets, {'device': 'cpu', **given})
    assert word in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_cuda_that_is_not_there():
    with pytest.raises(ValueError, match='--device cuda: .* use --device cpu'):
        training.choose_device('cuda')
    assert training.choose_device('auto') in ('cpu', 'mps')
