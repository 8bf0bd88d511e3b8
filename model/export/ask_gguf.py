"""Ask GGUF files through llama-cpp-python, the bindings of llama.cpp. Greedy, one prompt at a time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

# a logger of llama.cpp that writes nothing; the library keeps it
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class LlamaCpp:
    """A language model and its mmproj in llama.cpp, on the CPU. Use it as a context.

    num_tokens: of the longest prompt with its answer.
    """

    def __init__(self, language_model: Path, mmproj: Path, num_tokens: int) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._library, self._images = llama_cpp, mtmd_cpp
        mtmd_cpp.mtmd_log_set(_SILENT, None)
        mtmd_cpp.mtmd_helper_log_set(_SILENT, None)
        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the default rounds to F16
        size = {"n_ctx": num_tokens, "n_batch": num_tokens}
        self._model: Any = llama_cpp.Llama(str(language_model), n_gpu_layers=0, verbose=False, **size, **cache)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        parameters = mtmd_cpp.mtmd_context_params_default()
        parameters.use_gpu, parameters.print_timings = False, False
        self._projector = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self._model.model, parameters)
        if self._projector is None:
            raise RuntimeError(f"{mmproj}: llama.cpp cannot load it")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(self._model.metadata["tokenizer.chat_template"])

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._images.mtmd_free(self._projector)
        self._model.close()

    def ask(
        self, messages: list[dict], images: Sequence[np.ndarray], new_tokens: int
    ) -> tuple[list[int | None], np.ndarray, str]:
        """Answer chat messages about images, uint8 [S, S, 3]. Returns (the prompt's ids, None for each image token; the
        logits [V] after the prompt; the answer)."""
        prompt = self._template.render(messages=messages, add_generation_prompt=True)
        self._model.reset()
        ids: list[int | None] = []
        with self._chunks(prompt, images) as chunks:
            for i in range(self._images.mtmd_input_chunks_size(chunks)):
                ids += self._read(self._images.mtmd_input_chunks_get(chunks, i))
        first = self._logits()
        answer: list[int] = []
        logits = first
        while len(answer) < new_tokens:
            token = int(logits.argmax())
            if self._library.llama_vocab_is_eog(self._vocabulary, token):
                break
            answer.append(token)
            self._model.eval([token])
            logits = self._logits()
        return ids, first, self._model.detokenize(answer).decode("utf-8", "replace")

    def _logits(self) -> np.ndarray:
        """Return a copy of the logits [V] of the last position."""
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),)).copy()

    @contextlib.contextmanager
    def _chunks(self, prompt: str, images: Sequence[np.ndarray]) -> Iterator[Any]:
        """Yield the prompt cut into pieces of text and images."""
        library = self._images
        loaded = [self._bitmap(image) for image in images]
        chunks = library.mtmd_input_chunks_init()
        try:
            text = library.mtmd_input_text()
            encoded = prompt.encode()
            text.text, text.text_len = encoded, len(encoded)
            text.add_special, text.parse_special = False, True
            array = (library.mtmd_bitmap_p_ctypes * len(loaded))(*loaded)
            if library.mtmd_tokenize(self._projector, chunks, ctypes.byref(text), array, len(loaded)):
                raise RuntimeError(f"llama.cpp cannot encode the prompt {prompt!r:.200}")
            yield chunks
        finally:
            library.mtmd_input_chunks_free(chunks)
            for bitmap in loaded:
                library.mtmd_bitmap_free(bitmap)

    def _bitmap(self, image: np.ndarray) -> Any:
        pixels = np.ascontiguousarray(image)
        height, width, _ = pixels.shape
        return self._images.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))

    def _read(self, chunk: Any) -> list[int | None]:
        """Let the model read one piece, and return its ids."""
        library = self._images
        if library.mtmd_input_chunk_get_type(chunk) == library.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            pointer = library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            tokens = [pointer[i] for i in range(count.value)]
            self._model.eval(tokens)
            return list(tokens)
        position = self._library.llama_pos(0)
        failed = library.mtmd_helper_eval_chunk_single(
            self._projector,
            self._model.ctx,
            chunk,
            self._library.llama_pos(self._model.n_tokens),
            self._library.llama_seq_id(0),
            self._model.n_batch,
            False,
            ctypes.byref(position),
        )
        if failed:
            raise RuntimeError(f"llama.cpp cannot read an image (error {failed})")
        self._model.n_tokens = position.value
        return [None] * library.mtmd_input_chunk_get_n_tokens(chunk)
