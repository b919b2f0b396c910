"""Captions become prompts: whatever is missing, doubled, contradictory or too long is said by name."""

from pathlib import Path

from caption_reading import failure, prompts, read

from ether_diffusion.training.photos import compare_fingerprints


def test_photos_without_a_caption_get_the_instance_prompt_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks on a beach\n")
    captions = read(tmp_path)
    assert prompts(captions) == ["sks on a beach", "a photo of sks dog"]
    assert [caption.source for caption in captions.captions] == ["a.txt", None]
    assert captions.num_fallbacks == 1
    assert captions.warnings == ("1 of 2 photos have no caption and get the instance prompt: b.jpg",)


def test_a_folder_without_any_captions_is_no_cause_for_warnings(tmp_path: Path) -> None:
    captions = read(tmp_path)
    assert (captions.num_fallbacks, captions.warnings) == (2, ())


def test_a_photo_without_caption_and_instance_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks on a beach")
    expected = "b.jpg has no caption, and there is no instance prompt; write either"
    assert failure(tmp_path, instance_prompt=None).endswith(f"\n  {expected}")


def test_captions_that_contradict_each_other_are_named_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "a.caption").write_text("sks awake")
    (tmp_path / "b.txt").write_text("sks awake")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.jpg", "text": "sks runs"}')
    said = failure(tmp_path)
    assert (
        'a.jpg has different captions, "sks awake" in a.caption and "sks asleep" in a.txt; keep one' in said
    )
    assert (
        'b.jpg has different captions, "sks awake" in b.txt and "sks runs" in metadata.jsonl line 1' in said
    )


def test_captions_that_agree_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "a.caption").write_text("sks  asleep\n")
    assert prompts(read(tmp_path, "a.jpg")) == ["sks asleep"]


def test_one_caption_for_two_photos_and_one_for_none_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "metadata.csv").write_text("file_name,text\nc.jpg,sks\n")
    assert read(tmp_path, "a.jpg a.png").warnings == (
        "a.txt is the caption of 2 photos: a.jpg, a.png",
        "2 captions belong to no usable photo: c.jpg (metadata.csv line 2), readme.txt",
    )


def test_an_empty_caption_is_none_and_several_lines_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"sks\r\nasleep\r\n")
    captions = read(tmp_path)
    assert prompts(captions) == ["a photo of sks dog", "sks asleep"]
    assert "a.txt: empty; the instance prompt stands in" in captions.warnings
    assert "b.txt: of several lines, which are read as one caption" in captions.warnings


def test_the_token_is_filled_in_everywhere_and_other_braces_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{token} in {red|blue}")
    captions = read(tmp_path, template="{caption}, photo of {token}")
    assert prompts(captions) == ["sks in {red|blue}, photo of sks", "a photo of sks dog, photo of sks"]


def test_a_token_that_is_asked_for_and_not_given_is_named(tmp_path: Path) -> None:
    assert "a.jpg asks for {token}, and none is given" in failure(tmp_path, token=None)


def test_a_template_without_caption_says_that_captions_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    captions = read(tmp_path, "a.jpg", template="photo of {token}", instance_prompt=None)
    assert prompts(captions) == ["photo of sks"]
    assert captions.warnings == (
        "the template has no {caption}, so that the captions of 1 photos are not used",
    )


def test_a_template_may_only_have_the_two_fields(tmp_path: Path) -> None:
    assert failure(tmp_path, template="{captoin}") == "the template has {captoin}; use {token} and {caption}"


def test_an_absent_trigger_word_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog that asks")
    warning = 'the trigger word "sks" is absent from 1 of 2 prompts: a.jpg'
    assert warning in read(tmp_path).warnings


def test_a_prompt_of_2_mb_is_refused(tmp_path: Path) -> None:
    said = failure(tmp_path, instance_prompt="x" * 2**21)
    assert said == "the instance prompt has 2097152 characters; at most 10000 are read"
    (tmp_path / "a.txt").write_bytes(b"x" * 2**21)
    (tmp_path / "b.txt").write_bytes(b"x" * 20_000)
    said = failure(tmp_path)
    assert "a.txt has more than 0.0625 MiB; give a smaller file" in said
    assert "b.txt makes a prompt of 20000 characters; at most 10000 are read" in said


def test_control_characters_and_overrides_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks \u202egnp \x1b[31m")
    (tmp_path / "b.txt").write_text("sks 👩\u200d👧")
    assert read(tmp_path).warnings == (
        'a prompt has characters that cannot be seen: "sks \\u202egnp \\x1b[31m"',
    )


def test_a_changed_caption_is_seen_in_the_fingerprint(tmp_path: Path) -> None:
    before = read(tmp_path).fingerprint()
    (tmp_path / "a.txt").write_text("sks asleep")
    assert str(compare_fingerprints(before, read(tmp_path).fingerprint())) == "changed: prompt of a.jpg"
