// jax_kvpool._files: what FileStore's threads do with files.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <memory>
#include <string>

#include "file_queue.h"
#include "record_file.h"
#include "released_gil.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpool {
namespace {

using Record = nb::ndarray<uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

std::span<char> BytesOf(const Record& record) { return {reinterpret_cast<char*>(record.data()), record.size()}; }

// What Python holds: one owner beside the work that is done with it.
struct PyOpenFile {
  std::shared_ptr<OpenFile> file;
};

// As the functions of `os` take it: names of files need not be Unicode.
std::string Path(const nb::str& path) {
  const nb::object encoded = nb::steal(PyUnicode_EncodeFSDefault(path.ptr()));
  if (!encoded.is_valid()) nb::raise_python_error();
  return {PyBytes_AsString(encoded.ptr()), static_cast<size_t>(PyBytes_Size(encoded.ptr()))};
}

// Waits as Python does: signals are handled meanwhile.
FileQueue::Done Next(FileQueue& queue) {
  constexpr std::chrono::milliseconds kPatience(50);
  FileQueue::Done done;
  while (true) {
    {
      const ReleasedGil released;
      if (queue.Take(done, kPatience)) return done;
    }
    if (queue.IsEmpty()) throw nb::stop_iteration();
    if (PyErr_CheckSignals() != 0) nb::raise_python_error();
  }
}

}  // namespace
}  // namespace kvpool

NB_MODULE(_files, m) {
  using namespace kvpool;

  m.def(
      "is_cached",
      [](const nb::str& path) {
        const std::string file = Path(path);
        const ReleasedGil released;
        return IsCached(file);
      },
      "path"_a);

  nb::class_<PyOpenFile>(m, "OpenFile")
      .def_prop_ro("descriptor", [](const PyOpenFile& self) { return self.file->descriptor(); })
      .def("close", [](const PyOpenFile& self) { self.file->Close(); }, nb::call_guard<ReleasedGil>());

  nb::class_<FileQueue::Done>(m, "Done")
      .def_ro("index", &FileQueue::Done::index)
      .def_prop_ro("error", [](const FileQueue::Done& self) { return self.result.error; })
      .def_prop_ro("file_bytes", [](const FileQueue::Done& self) { return self.result.file_bytes; })
      .def_prop_ro("is_direct_refused", [](const FileQueue::Done& self) { return self.result.is_direct_refused; })
      .def_prop_ro("file", [](const FileQueue::Done& self) {
        if (!self.result.file) throw nb::attribute_error("file: no file was created");
        return PyOpenFile{self.result.file};
      });

  nb::class_<FileQueue>(m, "FileQueue")
      .def(nb::init<size_t>(), "depth"_a)
      .def(
          "stat",
          [](FileQueue& self, int64_t index, const nb::str& path) {
            self.Submit(index, [path = Path(path)] { return StatRecord(path); });
          },
          "index"_a, "path"_a)
      .def(
          "read",
          [](FileQueue& self, int64_t index, const nb::str& path, const Record& record, bool is_direct) {
            self.Submit(index, [path = Path(path), record = BytesOf(record), is_direct] {
              return ReadRecord(path, record, is_direct);
            });
          },
          "index"_a, "path"_a, "record"_a.noconvert(), "is_direct"_a)
      .def(
          "create",
          [](FileQueue& self, int64_t index, const nb::str& temporary, const nb::str& path, int64_t num_bytes) {
            self.Submit(index, [temporary = Path(temporary), path = Path(path), num_bytes] {
              return CreateRecord(temporary, path, num_bytes);
            });
          },
          "index"_a, "temporary"_a, "path"_a, "num_bytes"_a)
      .def(
          "write",
          [](FileQueue& self, int64_t index, const PyOpenFile& file, const nb::str& temporary, const nb::str& path,
             const Record& record, bool is_direct, bool sync) {
            self.Submit(
                index,
                [file = file.file, temporary = Path(temporary), path = Path(path), record = BytesOf(record), is_direct,
                 sync] { return WriteRecord(*file, temporary, path, record, is_direct, sync); },
                /*is_urgent=*/true);  // there may be room for nothing else before it has its name
          },
          "index"_a, "file"_a, "temporary"_a, "path"_a, "record"_a.noconvert(), "is_direct"_a, "sync"_a)
      .def(
          "remove",
          [](FileQueue& self, int64_t index, const nb::str& path) {
            self.Submit(index, [path = Path(path)] { return RemoveRecord(path); });
          },
          "index"_a, "path"_a)
      .def(
          "__iter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __iter__(self) -> FileQueue"))
      .def("__next__", &Next)
      .def("close", &FileQueue::Close, nb::call_guard<ReleasedGil>());
}
