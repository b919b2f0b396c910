"""Training of Tiny World: resume, averages, tokenizer, objectives; all in small."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from recipes.tiny_world.autoencoder import LATENT_NOISE, DecoderStage, build_vae, psnr
from recipes.tiny_world.average import Average
from recipes.tiny_world.checkpoint import newest_checkpoint
from recipes.tiny_world.clip import build_text_tower, tokenize
from recipes.tiny_world.clock import Clock
from recipes.tiny_world.data import Composites, join_composites
from recipes.tiny_world.loop import Batch, RunConfig, Trainer, step_generator
from recipes.tiny_world.tokenizer import IDENTIFIERS, train_tokenizer
from recipes.tiny_world.unet import SCHEDULE, UNetObjective

CAPTIONS = ["a cat on a red background", "a small apple in the snow", "an animal in space", "a dog"] * 50


class LineObjective(torch.nn.Module):
    """Fits y = 2 x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (self.line(x) - 2 * x - 1).square().mean()
        return loss


class LineStage:
    """The smallest stage."""

    name = "line"
    batch_size = 4
    learning_rate = 0.05
    average_decay = 0.9

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: torch.nn.Module = LineObjective()
        self.sheets: list[Path] = []

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        return {"x": torch.randn((batch_size, 1), generator=generator)}

    def write_sheet(self, path: Path, device: torch.device) -> None:
        self.sheets.append(path)


def config_for(folder: Path, max_steps: int) -> RunConfig:
    return RunConfig(run_folder=folder, max_steps=max_steps, mixed_precision="no")


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "line")
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors") | {
        f"average.{name}": tensor for name, tensor in load_file(checkpoint / "average.safetensors").items()
    }


def test_a_run_in_two_pieces_ends_with_the_bytes_of_a_run_in_one(tmp_path: Path) -> None:
    Trainer(LineStage(), config_for(tmp_path / "one", 30)).run()
    Trainer(LineStage(), config_for(tmp_path / "two", 13)).run()
    Trainer(LineStage(), config_for(tmp_path / "two", 30)).run()
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_unfinished_checkpoint_is_never_resumed_from(tmp_path: Path) -> None:
    Trainer(LineStage(), config_for(tmp_path, 5)).run()
    unfinished = tmp_path / "line" / "unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half of a file")
    trainer = Trainer(LineStage(), config_for(tmp_path, 8))
    assert trainer.step == 5
    trainer.run()
    assert trainer.step == 8


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    for steps in (3, 6, 9):
        Trainer(LineStage(), config_for(tmp_path, steps)).run()
    assert [path.name for path in sorted((tmp_path / "line").glob("step-*"))] == ["step-00000009"]


def test_sheets_are_drawn_with_averaged_weights_that_are_taken_back_after() -> None:
    model = torch.nn.Linear(2, 2)
    average = Average(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model, 1000)
    with average.swapped_in(model):
        torch.testing.assert_close(model.weight.detach(), before + 0.5)
    torch.testing.assert_close(model.weight.detach(), before + 1.0)


def test_steps_and_processes_draw_different_numbers() -> None:
    draws = {
        float(torch.rand(1, generator=step_generator(seed, step, process)))
        for seed in (0, 1)
        for step in (0, 1)
        for process in (0, 1)
    }
    assert len(draws) == 8


def test_time_spent_paused_is_not_counted(tmp_path: Path) -> None:
    clock = Clock(1.0)
    clock.started -= 30.0
    clock.wait_while_exists(tmp_path / "absent")
    assert 0.5 <= clock.elapsed() < 0.52


def test_a_budget_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="time_budget_minutes"):
        RunConfig(time_budget_minutes=0)


def test_identifiers_are_single_tokens_and_any_text_survives() -> None:
    tokenizer = train_tokenizer(CAPTIONS, ["cat face", "red apple", "rocket"])
    for identifier in IDENTIFIERS:
        assert len(tokenizer(identifier, add_special_tokens=False).input_ids) == 1
    assert (
        tokenizer.decode(tokenizer("teapot ohwx 漢").input_ids, skip_special_tokens=True) == "teapot ohwx 漢"
    )


def test_captions_are_padded_with_the_end_token_to_one_length() -> None:
    tokenizer = train_tokenizer(CAPTIONS, ["cat face"])
    tokens = tokenize(tokenizer, ["a cat", "a small apple in the snow"])
    assert tokens.shape == (2, tokenizer.model_max_length)
    assert tokens[0, -1] == tokenizer.eos_token_id


def test_the_text_tower_pools_at_the_first_end_token() -> None:
    tokenizer = train_tokenizer(CAPTIONS, ["cat face"])
    tower = build_text_tower(tokenizer).eval()
    padded = tokenize(tokenizer, ["a cat"])
    bare = tokenizer("a cat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            tower(input_ids=padded).text_embeds, tower(input_ids=bare).text_embeds, atol=1e-5, rtol=1e-4
        )


class PerfectUNet(torch.nn.Module):
    """Answers with the velocity that diffusers' scheduler computes."""

    def __init__(self, latents: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.latents, self.noise = latents, noise
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> object:
        expected = self.scheduler.add_noise(self.latents, self.noise, timesteps)
        torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=1e-5)
        return type(
            "Output", (), {"sample": self.scheduler.get_velocity(self.latents, self.noise, timesteps)}
        )


class NoText(torch.nn.Module):
    """Answers with states of zeros."""

    def forward(self, input_ids: torch.Tensor) -> object:
        return type("Output", (), {"last_hidden_state": torch.zeros(len(input_ids), 2, 4)})


def test_the_unet_objective_is_zero_for_the_velocity_of_diffusers() -> None:
    latents, noise = torch.randn(6, 4, 16, 16), torch.randn(6, 4, 16, 16)
    objective = UNetObjective(PerfectUNet(latents, noise), NoText())
    timesteps = torch.tensor([0, 1, 300, 700, 998, 999])
    loss = objective(latents, noise, timesteps, torch.zeros(6, 24, dtype=torch.long))
    assert float(loss) < 1e-8


def test_equal_pictures_have_infinite_psnr_and_an_error_of_one_step_48_db() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    assert psnr(picture, picture).isinf().all()
    assert float(psnr(picture, picture + 2 / 255)) == pytest.approx(48.13, abs=0.01)


def plain_composites() -> Composites:
    pixels = torch.randint(0, 255, (4, 3, 1, 1), dtype=torch.uint8).expand(4, 3, 64, 64).contiguous()
    return Composites(pixels, torch.arange(4), [""] * 4)


def test_the_posterior_has_a_constant_deviation() -> None:
    posterior = build_vae().encode(torch.randn(2, 3, 64, 64)).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, LATENT_NOISE))


def test_training_the_decoder_on_leaves_latents_as_they_are(tmp_path: Path) -> None:
    vae = build_vae()
    images = torch.randn(1, 3, 64, 64)
    latents = vae.encode(images).latent_dist.mean.detach()
    pictures = vae.decode(latents).sample.detach()
    Trainer(DecoderStage(plain_composites(), vae), config_for(tmp_path, 1).replace(batch_size=1)).train_step(
        0.0
    )
    assert torch.equal(vae.encode(images).latent_dist.mean, latents)
    assert not torch.equal(vae.decode(latents).sample, pictures)


def test_joined_composites_number_the_second_classes_after_the_first() -> None:
    joined = join_composites(plain_composites(), plain_composites())
    assert joined.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
