// fastgpt._C: a typed view of the two libraries, for people and tests. It knows their C interface, which speaks JSON,
// and nothing else of them; they never need it, so they can be carried to another Python.

#include <dlfcn.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace {

using Place = std::optional<std::tuple<int, int, int>>;

struct BuildInfo {
  std::string kind, schema_digest, torch_target, torch_headers, compiler, nvcc, archs_from;
  std::vector<std::string> archs;
};
struct Kernel {
  std::string name, arch;
  int registers, shared_bytes, local_bytes, spilled_bytes;
};
struct Path {
  std::string entry, path, reason;
};
struct Finding {
  std::string kind, kernel, message, file;
  Place thread, block;
  int line;
  std::vector<std::string> inlined;
};
struct Counter {
  std::string kernel, file, space, access;
  int line;
  uint64_t requests, bytes, units, ideal_units, bank_conflicts, flops;
};

// A value of a JSON object; what is not there, or null, is T().
template <class T>
T get(const py::dict& object, const char* name) {
  return object.contains(name) && !object[name].is_none() ? object[name].cast<T>() : T();
}

Path path_of(const py::dict& said) {
  return {get<std::string>(said, "entry"), get<std::string>(said, "path"), get<std::string>(said, "reason")};
}

class Library {
 public:
  explicit Library(const std::string& kind) {
    const py::object found = py::module_::import("fastgpt.native.loading").attr("library")(kind);
    if (!py::hasattr(found, "handle")) throw std::runtime_error(py::str(found).cast<std::string>());  // refused
    path_ = py::str(found.attr("path")).cast<std::string>();
    handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!handle_) throw std::runtime_error(path_ + " is not the library that was loaded");
  }

  const std::string& path() const { return path_; }

  BuildInfo build_info() const {
    const py::dict said = json("fastgpt_build_info");
    const auto text = [&](const char* name) { return get<std::string>(said, name); };
    return {text("kind"),     text("schema_digest"), text("torch_target"), text("torch_headers"),
            text("compiler"), text("nvcc"),          text("archs_from"),   get<std::vector<std::string>>(said, "archs")};
  }

  std::vector<Kernel> kernels() const {
    std::vector<Kernel> all;
    for (const py::handle item : json("fastgpt_kernels")) {
      const auto said = item.cast<py::dict>();
      const auto number = [&](const char* name) { return get<int>(said, name); };
      all.push_back({get<std::string>(said, "name"), get<std::string>(said, "arch"), number("registers"),
                     number("shared_bytes"), number("local_bytes"), number("spilled_bytes")});
    }
    return all;
  }

  Path last_path() const { return path_of(json("fastgpt_last_path")); }

  std::vector<Path> choose_path(const py::function& call) const {
    const auto ask = reinterpret_cast<void (*)(int)>(symbol("fastgpt_ask"));
    const struct Asking {
      void (*ask)(int);
      explicit Asking(void (*ask)(int)) : ask(ask) { ask(1); }
      ~Asking() { ask(0); }
    } asking(ask);
    call();
    std::vector<Path> all;
    for (const py::handle item : json("fastgpt_asked")) all.push_back(path_of(item.cast<py::dict>()));
    return all;
  }

  std::vector<Finding> findings() const {
    std::vector<Finding> all;
    for (const py::handle item : json("fastgpt_emulator_findings")) {
      const auto said = item.cast<py::dict>();
      const auto text = [&](const char* name) { return get<std::string>(said, name); };
      all.push_back({text("kind"), text("kernel"), text("message"), text("file"), get<Place>(said, "thread"),
                     get<Place>(said, "block"), get<int>(said, "line"),
                     get<std::vector<std::string>>(said, "inlined")});
    }
    return all;
  }

  std::vector<Counter> counters() const {
    std::vector<Counter> all;
    for (const py::handle item : json("fastgpt_emulator_counters")) {
      const auto said = item.cast<py::dict>();
      const auto text = [&](const char* name) { return get<std::string>(said, name); };
      const auto number = [&](const char* name) { return get<uint64_t>(said, name); };
      all.push_back({text("kernel"), text("file"), text("space"), text("access"), get<int>(said, "line"),
                     number("requests"), number("bytes"), number("sectors") + number("wavefronts"),
                     number("ideal_sectors") + number("ideal_wavefronts"), number("bank_conflicts"), number("flops")});
    }
    return all;
  }

 private:
  void* symbol(const char* name) const {
    void* found = dlsym(handle_, name);
    if (!found) throw std::runtime_error(path_ + " has no " + name + ": it is the other library that tells this");
    return found;
  }

  py::object json(const char* name) const {
    const auto call = reinterpret_cast<const char* (*)()>(symbol(name));
    return py::module_::import("json").attr("loads")(call());
  }

  std::string path_;
  void* handle_;
};

// "Kernel(name='...', arch='80', ...)", from the fields that Python sees.
template <class T>
void add_repr(py::class_<T>& type, std::vector<const char*> fields) {
  type.def("__repr__", [fields](const py::object& self) {
    std::string text = py::type::of(self).attr("__name__").cast<std::string>() + "(";
    for (size_t i = 0; i < fields.size(); ++i)
      text += (i ? ", " : "") + std::string(fields[i]) + "=" + py::repr(self.attr(fields[i])).cast<std::string>();
    return text + ")";
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "A typed view of the compiled kernels: what they were built for, what they take, which path a call takes.";

  py::class_<BuildInfo> build_info(m, "BuildInfo", "What a library was built from and for.");
  build_info.def_readonly("kind", &BuildInfo::kind, "cuda or emulated.")
      .def_readonly("schema_digest", &BuildInfo::schema_digest, "Of the ops' schemas that it was built for.")
      .def_readonly("torch_target", &BuildInfo::torch_target, "The oldest torch that it runs with.")
      .def_readonly("torch_headers", &BuildInfo::torch_headers, "The torch that it was compiled against.")
      .def_readonly("compiler", &BuildInfo::compiler, "The C++ compiler.")
      .def_readonly("nvcc", &BuildInfo::nvcc, "The version of nvcc; empty for the emulated kernels.")
      .def_readonly("archs", &BuildInfo::archs, "The architectures it has code for: 8.0+PTX, 9.0a.")
      .def_readonly("archs_from", &BuildInfo::archs_from, "Who chose them.");
  add_repr(build_info, {"kind", "schema_digest", "torch_target", "torch_headers", "compiler", "nvcc", "archs",
                        "archs_from"});

  py::class_<Kernel> kernel(m, "Kernel", "A kernel on one architecture, as ptxas compiled it.");
  kernel.def_readonly("name", &Kernel::name, "Its name in C++, with template arguments.")
      .def_readonly("arch", &Kernel::arch, "The architecture as nvcc writes it: 80, 90a.")
      .def_readonly("registers", &Kernel::registers, "Of a thread.")
      .def_readonly("shared_bytes", &Kernel::shared_bytes, "Of a block, without what a launch adds.")
      .def_readonly("local_bytes", &Kernel::local_bytes, "A thread's stack frame.")
      .def_readonly("spilled_bytes", &Kernel::spilled_bytes, "Of registers that did not fit.");
  add_repr(kernel, {"name", "arch", "registers", "shared_bytes", "local_bytes", "spilled_bytes"});

  py::class_<Path> path(m, "Path", "Which of an op's kernel paths serves a call, and why.");
  path.def_readonly("entry", &Path::entry, "The entry: layer_norm_forward.")
      .def_readonly("path", &Path::path, "The path: vector, generic.")
      .def_readonly("reason", &Path::reason, "Why this one.");
  add_repr(path, {"entry", "path", "reason"});

  py::class_<Finding> finding(m, "Finding", "What the emulator holds against a kernel; see docs/emulator.md.");
  finding.def_readonly("kind", &Finding::kind, "data race, out of bounds, deadlock ...")
      .def_readonly("kernel", &Finding::kernel, "The kernel.")
      .def_readonly("message", &Finding::message, "What is wrong.")
      .def_readonly("thread", &Finding::thread, "(x, y, z); None where no single thread is to blame.")
      .def_readonly("block", &Finding::block, "(x, y, z), or None.")
      .def_readonly("file", &Finding::file, "The source file.")
      .def_readonly("line", &Finding::line, "The line in it.")
      .def_readonly("inlined", &Finding::inlined, "Through which calls the line got inlined, innermost first.");
  add_repr(finding, {"kind", "kernel", "message", "thread", "block", "file", "line", "inlined"});

  py::class_<Counter> counter(m, "Counter", "What the emulator counted at one source line of a kernel.");
  counter.def_readonly("kernel", &Counter::kernel, "The kernel.")
      .def_readonly("file", &Counter::file, "The source file.")
      .def_readonly("line", &Counter::line, "The line in it.")
      .def_readonly("space", &Counter::space, "global, shared, or the unit that computed.")
      .def_readonly("access", &Counter::access, "load or store; empty for matrix instructions.")
      .def_readonly("requests", &Counter::requests, "Of warps.")
      .def_readonly("bytes", &Counter::bytes, "Asked for.")
      .def_readonly("units", &Counter::units, "32-byte sectors in global memory, wavefronts in shared memory.")
      .def_readonly("ideal_units", &Counter::ideal_units, "The fewest that could do.")
      .def_readonly("bank_conflicts", &Counter::bank_conflicts, "In shared memory: the difference of the two.")
      .def_readonly("flops", &Counter::flops, "Of matrix instructions.");
  add_repr(counter, {"kernel", "file", "line", "space", "access", "requests", "bytes", "units", "ideal_units",
                     "bank_conflicts", "flops"});

  py::class_<Library>(m, "Library", "One of the two libraries, loaded and checked by fastgpt.native.")
      .def(py::init<const std::string&>(), py::arg("kind") = "cuda",
           "kind: cuda or emulated. Raises RuntimeError with the reason where the library is refused.")
      .def_property_readonly("path", &Library::path, "Its file.")
      .def_property_readonly("build_info", &Library::build_info, "What it was built from and for.")
      .def("kernels", &Library::kernels, "Every kernel of the CUDA library on every architecture.")
      .def("last_path", &Library::last_path, "The path of this thread's last call.")
      .def("choose_path", &Library::choose_path, py::arg("call"),
           "The paths that the calls inside `call()` would take, in order. Nothing is launched, so what the ops return "
           "there has no values.")
      .def("findings", &Library::findings, "Of the emulated library: what it found since it was last asked.")
      .def("counters", &Library::counters, "Of the emulated library, with emulated(profile=True): since it was asked.");
}
