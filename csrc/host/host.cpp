// The host side's hot loops: the order of the samples and the packing. They hold no tensors and no torch. And, for
// their tests, how CUDA kernels are launched.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../permute/permute_heuristics.h"
#include "../router/router_heuristics.h"
#include "../sva/sva_heuristics.h"
#include "order.h"
#include "pack.h"

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

static py::tuple blend(const Array<std::int64_t>& counts) {
  const auto period = mmoe::total(counts.data(), counts.size());
  Array<std::int32_t> source(period);
  Array<std::int64_t> rank(period);
  mmoe::blend(counts.data(), counts.size(), source.mutable_data(), rank.mutable_data());
  return py::make_tuple(source, rank);
}

static Array<std::int64_t> permute(const Array<std::int64_t>& index, std::int64_t size, std::uint64_t key) {
  const mmoe::Permutation permutation(size, key);
  Array<std::int64_t> out(index.size());
  for (py::ssize_t i = 0; i < index.size(); ++i) {
    const std::int64_t value = index.data()[i];
    if (value < 0 || value >= size) throw py::index_error("index outside of [0, size)");
    out.mutable_data()[i] = permutation(value);
  }
  return out;
}

static Array<std::int32_t> pack(const Array<std::int64_t>& tokens, const Array<std::int64_t>& images,
                                std::int64_t max_tokens, std::int64_t max_images) {
  if (tokens.size() != images.size()) throw py::value_error("tokens and images differ in length");
  Array<std::int32_t> out(tokens.size());
  mmoe::Packing(tokens.data(), images.data(), tokens.size(), max_tokens, max_images).run(out.mutable_data());
  return out;
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Order and packing of the samples.";
  m.def("blend", &blend, py::arg("counts"),
        "Spreads sources evenly: counts[k] times source k in sum(counts) places.\n\n"
        "Returns (source int32, rank int64): place i belongs to source[i], which came rank[i] times before.");
  m.def("permute", &permute, py::arg("index"), py::arg("size"), py::arg("key"),
        "The keyed permutation of [0, size) at each index, int64; O(1) each, without state.");
  m.def("pack", &pack, py::arg("tokens"), py::arg("images"), py::arg("max_tokens"), py::arg("max_images"),
        "The pack of each item, int32; -1 for an item that fits in no pack. Every pack holds something.");
  m.def("row_threads", &mmoe::row_threads, py::arg("pieces"), py::arg("held"),
        "CUDA threads of a block that takes `held` of a row's `pieces` a thread at a time (permute, unpermute).");
  m.def(
      "sva_projected_launch",
      [](std::int64_t heads, std::int64_t width, std::int64_t element_bytes, bool aligned, std::int64_t keys) {
        const auto launch = mmoe::sva::projected_launch(heads, width, element_bytes, aligned, keys);
        return py::dict(py::arg("vectors") = launch.vectors, py::arg("width") = launch.width,
                        py::arg("groups") = launch.groups, py::arg("warps") = launch.warps,
                        py::arg("shared_bytes") = launch.shared_bytes);
      },
      py::arg("heads"), py::arg("width"), py::arg("element_bytes"), py::arg("aligned"), py::arg("keys"),
      "The fields of ProjectedLaunch, csrc/sva/sva_heuristics.h.");
  m.def(
      "sva_absorbed_layout",
      [](const std::vector<std::tuple<std::int64_t, std::int64_t, bool>>& encoders, std::int64_t heads,
         std::int64_t element_bytes, bool aligned, bool backward, std::int64_t most, std::int64_t preferred) {
        std::vector<mmoe::sva::AbsorbedShape> shapes;
        for (const auto& [window, channels, positions] : encoders) shapes.push_back({window, channels, positions});
        const auto at = mmoe::sva::absorbed_layout(shapes, heads, element_bytes, aligned, backward, most, preferred);
        std::vector<bool> streams, positions;
        for (size_t i = 0; i < shapes.size(); ++i) {
          streams.push_back(at.streams[i] >= 0);
          positions.push_back(at.positions[i] >= 0);
        }
        return py::dict(py::arg("staged") = at.staged, py::arg("row") = at.row, py::arg("plane") = at.plane,
                        py::arg("bytes") = at.bytes, py::arg("streams") = streams, py::arg("positions") = positions);
      },
      py::arg("encoders"), py::arg("heads"), py::arg("element_bytes"), py::arg("aligned"), py::arg("backward"),
      py::arg("most"), py::arg("preferred"),
      "Of AbsorbedLayout, csrc/sva/sva_heuristics.h, for encoders (window, channels, whether there are positions).");
  m.def("sva_absorbed_blocks", &mmoe::sva::absorbed_blocks, py::arg("queries"), py::arg("multiprocessors"),
        py::arg("bytes_of_multiprocessor"), py::arg("bytes"),
        "Blocks of the kernels over absorbed encoders, csrc/sva/sva_heuristics.h.");
  m.def(
      "router_forward_launch",
      [](std::int64_t tokens, std::int64_t columns, bool aligned, std::int64_t multiprocessors,
         std::int64_t shared_limit) {
        const auto launch = mmoe::router::forward_launch(tokens, columns, aligned, multiprocessors, shared_limit);
        return py::dict(py::arg("vectors") = launch.vectors, py::arg("warps") = launch.warps,
                        py::arg("blocks") = launch.blocks, py::arg("shared_bytes") = launch.shared_bytes);
      },
      py::arg("tokens"), py::arg("columns"), py::arg("aligned"), py::arg("multiprocessors"), py::arg("shared_limit"),
      "The fields of ForwardLaunch, csrc/router/router_heuristics.h.");
  m.def(
      "router_backward_launch",
      [](std::int64_t tokens, std::int64_t columns, std::int64_t multiprocessors) {
        const auto launch = mmoe::router::backward_launch(tokens, columns, multiprocessors);
        return py::dict(py::arg("warps") = launch.warps, py::arg("blocks") = launch.blocks,
                        py::arg("shared_bytes") = launch.shared_bytes);
      },
      py::arg("tokens"), py::arg("columns"), py::arg("multiprocessors"),
      "The fields of BackwardLaunch, csrc/router/router_heuristics.h.");
}
