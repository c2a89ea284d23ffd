// Loops over the tensors of a decoding step: each function does what the one of its name in
// fxopt/runtime/step_loops.py does, where it is described.

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/Storage.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <string>
#include <utility>

namespace {

using Sizes = c10::SmallVector<int64_t, 8>;

// The items of a list or tuple, kept while it lives.
class Items {
 public:
  explicit Items(PyObject* sequence) : fast_(PySequence_Fast(sequence, "wanted a list or tuple")) {}
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() { Py_XDECREF(fast_); }

  explicit operator bool() const { return fast_ != nullptr; }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_); }
  PyObject* operator[](Py_ssize_t place) const { return PySequence_Fast_GET_ITEM(fast_, place); }

 private:
  PyObject* fast_;
};

bool of_one_length(const Items& first, const Items& second) {
  if (first.size() == second.size()) {
    return true;
  }
  PyErr_SetString(PyExc_ValueError, "wanted as many of each");
  return false;
}

const at::Tensor* tensor_of(PyObject* object) {
  if (THPVariable_Check(object)) {
    return &THPVariable_Unpack(object);
  }
  PyErr_SetString(PyExc_TypeError, "wanted a tensor");
  return nullptr;
}

bool read(PyObject* numbers, Sizes& sizes) {
  Items items(numbers);
  if (!items) {
    return false;
  }
  sizes.clear();
  for (Py_ssize_t place = 0; place < items.size(); ++place) {
    sizes.push_back(PyLong_AsLongLong(items[place]));
  }
  return PyErr_Occurred() == nullptr;
}

// What is known of a tensor but for its memory.
class Form {
 public:
  explicit Form(const at::Tensor& tensor) : impl_(*tensor.unsafeGetTensorImpl()) {
    head_.keys = impl_.key_set().raw_repr();
    head_.dtype = static_cast<int64_t>(impl_.dtype().toScalarType());
    head_.device = static_cast<int64_t>(impl_.device().type());
    head_.index = impl_.device().index();
    head_.rank = impl_.dim();
  }

  size_t size() const { return sizeof head_ + 2 * row(); }

  void write(char* place) const {
    std::memcpy(place, &head_, sizeof head_);
    std::memcpy(place + sizeof head_, impl_.sizes().data(), row());
    std::memcpy(place + sizeof head_ + row(), impl_.strides().data(), row());
  }

  // But for the size of dimension `but`.
  bool is(const char* place, int64_t but) const {
    if (std::memcmp(place, &head_, sizeof head_) != 0 ||
        std::memcmp(place + sizeof head_ + row(), impl_.strides().data(), row()) != 0) {
      return false;
    }
    const auto sizes = impl_.sizes();
    for (int64_t dim = 0; dim < head_.rank; ++dim) {
      int64_t size = 0;
      std::memcpy(&size, place + sizeof head_ + dim * sizeof size, sizeof size);
      if (dim != but && size != sizes[dim]) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Head {
    uint64_t keys;
    int64_t dtype, device, index, rank;
  };

  size_t row() const { return static_cast<size_t>(head_.rank) * sizeof(int64_t); }

  const c10::TensorImpl& impl_;
  Head head_{};
};

PyObject* forms(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const int64_t but = count == 2 ? PyLong_AsLongLong(args[1]) : -1;
  if (count != 2 || PyErr_Occurred() != nullptr) {
    PyErr_SetString(PyExc_TypeError, "wanted tensors and a dimension");
    return nullptr;
  }
  Items items(args[0]);
  if (!items) {
    return nullptr;
  }
  std::string noted(reinterpret_cast<const char*>(&but), sizeof but);
  for (Py_ssize_t place = 0; place < items.size(); ++place) {
    const at::Tensor* tensor = tensor_of(items[place]);
    if (tensor == nullptr) {
      return nullptr;
    }
    const Form form(*tensor);
    noted.resize(noted.size() + form.size());
    form.write(noted.data() + noted.size() - form.size());
  }
  return PyBytes_FromStringAndSize(noted.data(), static_cast<Py_ssize_t>(noted.size()));
}

// Has the processor fetch what is going to be looked at, as a step of the model has displaced it from its caches.
void fetch(const Items& items, Py_ssize_t place) {
  constexpr Py_ssize_t kObjects = 16, kTensors = 8;
  if (place + kObjects < items.size()) {
    __builtin_prefetch(items[place + kObjects]);
  }
  if (place + kTensors < items.size() && THPVariable_Check(items[place + kTensors])) {
    const char* impl =
        reinterpret_cast<const char*>(THPVariable_Unpack(items[place + kTensors]).unsafeGetTensorImpl());
    for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) {
      __builtin_prefetch(impl + line);
    }
  }
}

PyObject* forms_are(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t but = -1;
  if (count != 2 || !PyBytes_Check(args[1]) || PyBytes_GET_SIZE(args[1]) < static_cast<Py_ssize_t>(sizeof but)) {
    PyErr_SetString(PyExc_TypeError, "wanted tensors and their forms");
    return nullptr;
  }
  Items items(args[0]);
  if (!items) {
    return nullptr;
  }
  const char* noted = PyBytes_AS_STRING(args[1]);
  const char* const end = noted + PyBytes_GET_SIZE(args[1]);
  std::memcpy(&but, noted, sizeof but);
  noted += sizeof but;
  for (Py_ssize_t place = 0; place < items.size(); ++place) {
    fetch(items, place);
    const at::Tensor* tensor = tensor_of(items[place]);
    if (tensor == nullptr) {
      return nullptr;
    }
    const Form form(*tensor);
    if (noted + form.size() > end || !form.is(noted, but)) {
      Py_RETURN_FALSE;
    }
    noted += form.size();
  }
  return PyBool_FromLong(noted == end);
}

// Likewise, an object of any kind.
void fetch_head(const Items& items, Py_ssize_t place) {
  constexpr Py_ssize_t kAhead = 16;
  if (place + kAhead < items.size()) {
    __builtin_prefetch(items[place + kAhead]);
  }
}

PyObject* types_are(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "wanted objects and types");
    return nullptr;
  }
  Items objects(args[0]), types(args[1]);
  if (!objects || !types || !of_one_length(objects, types)) {
    return nullptr;
  }
  for (Py_ssize_t place = 0; place < objects.size(); ++place) {
    fetch_head(objects, place);
    if (reinterpret_cast<PyObject*>(Py_TYPE(objects[place])) != types[place]) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

PyObject* dicts_are(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "wanted objects and dicts");
    return nullptr;
  }
  Items objects(args[0]), dicts(args[1]);
  if (!objects || !dicts || !of_one_length(objects, dicts)) {
    return nullptr;
  }
  static PyObject* const name = PyUnicode_InternFromString("__dict__");
  for (Py_ssize_t place = 0; place < objects.size(); ++place) {
    PyObject* found = PyObject_GetAttr(objects[place], name);
    if (found == nullptr) {
      return nullptr;
    }
    const bool same = found == dicts[place];
    Py_DECREF(found);
    if (!same) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

// The code, defaults, and defaults of keywords of functions. From Python, reading the code of a function raises
// an audit event, which takes longer than all the rest.
constexpr Py_ssize_t kParts = 3;

PyObject* part_of(PyObject* function, Py_ssize_t part) {
  PyObject* found = part == 0   ? PyFunction_GET_CODE(function)
                    : part == 1 ? PyFunction_GET_DEFAULTS(function)
                                : PyFunction_GET_KW_DEFAULTS(function);
  return found == nullptr ? Py_None : found;
}

PyObject* codes(PyObject*, PyObject* sequence) {
  Items functions(sequence);
  PyObject* found = functions ? PyTuple_New(kParts * functions.size()) : nullptr;
  for (Py_ssize_t place = 0; found != nullptr && place < PyTuple_GET_SIZE(found); ++place) {
    PyObject* function = functions[place / kParts];
    if (!PyFunction_Check(function)) {
      PyErr_SetString(PyExc_TypeError, "wanted a function");
      Py_DECREF(found);
      return nullptr;
    }
    PyObject* part = part_of(function, place % kParts);
    Py_INCREF(part);
    PyTuple_SET_ITEM(found, place, part);
  }
  return found;
}

PyObject* codes_are(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "wanted functions and what they consist of");
    return nullptr;
  }
  Items functions(args[0]), noted(args[1]);
  if (!functions || !noted) {
    return nullptr;
  }
  if (noted.size() != kParts * functions.size()) {
    PyErr_SetString(PyExc_ValueError, "wanted three of each");
    return nullptr;
  }
  for (Py_ssize_t place = 0; place < noted.size(); ++place) {
    PyObject* function = functions[place / kParts];
    if (!PyFunction_Check(function) || part_of(function, place % kParts) != noted[place]) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

#if PY_VERSION_HEX < 0x030C0000
// Until Python 3.12 a dict has a number that is another one after each change.
PyObject* versions(PyObject*, PyObject* sequence) {
  Items dicts(sequence);
  if (!dicts) {
    return nullptr;
  }
  PyObject* found = PyBytes_FromStringAndSize(nullptr, dicts.size() * static_cast<Py_ssize_t>(sizeof(uint64_t)));
  for (Py_ssize_t place = 0; found != nullptr && place < dicts.size(); ++place) {
    fetch_head(dicts, place);
    if (!PyDict_Check(dicts[place])) {
      PyErr_SetString(PyExc_TypeError, "wanted a dict");
      Py_CLEAR(found);
      return nullptr;
    }
    const uint64_t version = reinterpret_cast<PyDictObject*>(dicts[place])->ma_version_tag;
    std::memcpy(PyBytes_AS_STRING(found) + place * sizeof version, &version, sizeof version);
  }
  return found;
}

PyObject* versions_are(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyBytes_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "wanted dicts and their versions");
    return nullptr;
  }
  Items dicts(args[0]);
  if (!dicts) {
    return nullptr;
  }
  if (PyBytes_GET_SIZE(args[1]) != dicts.size() * static_cast<Py_ssize_t>(sizeof(uint64_t))) {
    PyErr_SetString(PyExc_ValueError, "wanted as many of each");
    return nullptr;
  }
  const char* noted = PyBytes_AS_STRING(args[1]);
  for (Py_ssize_t place = 0; place < dicts.size(); ++place) {
    fetch_head(dicts, place);
    uint64_t version = 0;
    std::memcpy(&version, noted + place * sizeof version, sizeof version);
    if (!PyDict_Check(dicts[place]) || reinterpret_cast<PyDictObject*>(dicts[place])->ma_version_tag != version) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}
#endif

// References to a storage, and to its Python object; -1 on errors.
std::pair<int64_t, int64_t> references_to(const c10::Storage& storage) {
  PyObject* object = THPStorage_Wrap(storage);
  if (object == nullptr) {
    return {-1, -1};
  }
  const std::pair<int64_t, int64_t> found(storage.use_count(), Py_REFCNT(object));
  Py_DECREF(object);
  return found;
}

PyObject* references(PyObject*, PyObject* object) {
  const at::Tensor* tensor = tensor_of(object);
  if (tensor == nullptr) {
    return nullptr;
  }
  const auto [shared, held] = references_to(tensor->storage());
  return held < 0 ? nullptr : Py_BuildValue("LL", static_cast<long long>(shared), static_cast<long long>(held));
}

PyObject* are_alone(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long shared = 0, held = 0;
  if (count != 4 || !PyArg_ParseTuple(args[3], "LL", &shared, &held)) {
    PyErr_SetString(PyExc_TypeError, "wanted tensors, addresses, sizes and references");
    return nullptr;
  }
  Items tensors(args[0]), addresses(args[1]), sizes(args[2]);
  if (!tensors || !addresses || !sizes || !of_one_length(tensors, addresses) || !of_one_length(tensors, sizes)) {
    return nullptr;
  }
  for (Py_ssize_t place = 0; place < tensors.size(); ++place) {
    const at::Tensor* tensor = tensor_of(tensors[place]);
    if (tensor == nullptr) {
      return nullptr;
    }
    if (reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) != PyLong_AsUnsignedLongLong(addresses[place]) ||
        static_cast<long long>(tensor->nbytes()) != PyLong_AsLongLong(sizes[place])) {
      if (PyErr_Occurred() != nullptr) {
        return nullptr;
      }
      Py_RETURN_FALSE;
    }
    const auto found = references_to(tensor->storage());
    if (found.second < 0) {
      return nullptr;
    }
    if (found.first != shared || found.second != held) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

PyObject* alias_of(const at::Tensor& tensor, const Sizes& sizes, const Sizes& strides, int64_t beyond) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype());
  c10::TensorImpl* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset() + beyond);
  impl->set_sizes_and_strides(sizes, strides);
  return THPVariable_Wrap(std::move(made));
}

PyObject* aliases(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "wanted tensors, sizes, strides and offsets");
    return nullptr;
  }
  Items tensors(args[0]), sizes(args[1]), strides(args[2]), beyond(args[3]);
  if (!tensors || !sizes || !strides || !beyond || !of_one_length(tensors, sizes) ||
      !of_one_length(tensors, strides) || !of_one_length(tensors, beyond)) {
    return nullptr;
  }
  PyObject* made = PyList_New(tensors.size());
  if (made == nullptr) {
    return nullptr;
  }
  Sizes size, stride;
  for (Py_ssize_t place = 0; place < tensors.size(); ++place) {
    const at::Tensor* tensor = tensor_of(tensors[place]);
    PyObject* alias = nullptr;
    if (tensor != nullptr && read(sizes[place], size) && read(strides[place], stride)) {
      const long long offset = PyLong_AsLongLong(beyond[place]);
      if (PyErr_Occurred() == nullptr) {
        alias = alias_of(*tensor, size, stride, offset);
      }
    }
    if (alias == nullptr) {
      Py_DECREF(made);
      return nullptr;
    }
    PyList_SET_ITEM(made, place, alias);
  }
  return made;
}

// Nothing but one Python object has the tensor, and nobody would notice that the object changes.
bool can_change(PyObject* object, const at::Tensor& tensor) {
  const Py_ssize_t references = Py_TYPE(object)->tp_weaklistoffset;
  if (references != 0 && *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + references) != nullptr) {
    return false;
  }
  PyObject** const attributes = _PyObject_GetDictPtr(object);
  if (attributes != nullptr && *attributes != nullptr && PyDict_Size(*attributes) != 0) {
    return false;
  }
  return tensor.use_count() == 1 && tensor.unsafeGetTensorImpl()->allow_tensor_metadata_change();
}

// `object`, or another tensor, with `rows` along `dim`, beginning `beyond` entries behind the first one.
PyObject* with_rows(PyObject* object, const at::Tensor& tensor, int64_t dim, int64_t rows, int64_t beyond) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (can_change(object, tensor)) {
    impl->set_storage_offset(impl->storage_offset() + beyond);
    impl->set_size(dim, rows);
    Py_INCREF(object);
    return object;
  }
  Sizes sizes(impl->sizes());
  sizes[dim] = rows;
  return alias_of(tensor, sizes, Sizes(impl->strides()), beyond);
}

PyObject* resized(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const int64_t dim = count == 4 ? PyLong_AsLongLong(args[1]) : 0;
  if (count != 4 || PyErr_Occurred() != nullptr) {
    PyErr_SetString(PyExc_TypeError, "wanted tensors, a dimension, numbers of rows, and addresses");
    return nullptr;
  }
  Items tensors(args[0]), rows(args[2]), addresses(args[3]);
  if (!tensors || !rows || !addresses || !of_one_length(tensors, rows) || !of_one_length(tensors, addresses)) {
    return nullptr;
  }
  PyObject* found = PyList_New(tensors.size());
  if (found == nullptr) {
    return nullptr;
  }
  for (Py_ssize_t place = 0; place < tensors.size(); ++place) {
    const at::Tensor* tensor = tensor_of(tensors[place]);
    PyObject* result = nullptr;
    if (tensor != nullptr && (dim < 0 || dim >= tensor->dim())) {
      PyErr_SetString(PyExc_ValueError, "wanted another dimension");
    } else if (tensor != nullptr) {
      const long long size = PyLong_AsLongLong(rows[place]);
      const auto bytes = static_cast<int64_t>(
          PyLong_AsUnsignedLongLong(addresses[place]) - reinterpret_cast<uintptr_t>(tensor->const_data_ptr()));
      if (PyErr_Occurred() == nullptr) {
        result = with_rows(tensors[place], *tensor, dim, size, bytes / static_cast<int64_t>(tensor->itemsize()));
      }
    }
    if (result == nullptr) {
      Py_DECREF(found);
      return nullptr;
    }
    PyList_SET_ITEM(found, place, result);
  }
  return found;
}

PyObject* held_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "wanted dicts and names");
    return nullptr;
  }
  Items dicts(args[0]), names(args[1]);
  if (!dicts || !names || !of_one_length(dicts, names)) {
    return nullptr;
  }
  PyObject* found = PyList_New(dicts.size());
  if (found == nullptr) {
    return nullptr;
  }
  for (Py_ssize_t place = 0; place < dicts.size(); ++place) {
    PyObject* value = PyDict_GetItemWithError(dicts[place], names[place]);
    if (value == nullptr || Py_REFCNT(value) != 1) {
      Py_DECREF(found);
      if (PyErr_Occurred() != nullptr) {
        return nullptr;
      }
      Py_RETURN_NONE;
    }
    Py_INCREF(value);
    PyList_SET_ITEM(found, place, value);
  }
  return found;
}

// What Dynamo's code calls to store an attribute, whatever the class of the object says about it.
PyObject* store(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* const name = PyUnicode_InternFromString("__dict__");
  PyObject* held = count == 3 ? PyObject_GenericGetAttr(args[0], name) : nullptr;
  if (held == nullptr || !PyDict_CheckExact(held)) {
    Py_XDECREF(held);
    PyErr_Clear();
    PyObject* module = PyImport_ImportModule("torch._dynamo.utils");
    PyObject* other =
        module == nullptr ? nullptr : PyObject_GetAttrString(module, "object_setattr_ignore_descriptor");
    PyObject* result = other == nullptr ? nullptr : PyObject_Vectorcall(other, args, count, nullptr);
    Py_XDECREF(other);
    Py_XDECREF(module);
    return result;
  }
  const int failed = PyDict_SetItem(held, args[1], args[2]);
  Py_DECREF(held);
  if (failed != 0) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <typename Function>
PyCFunction cast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"forms", cast(forms), METH_FASTCALL, nullptr},
    {"forms_are", cast(forms_are), METH_FASTCALL, nullptr},
    {"types_are", cast(types_are), METH_FASTCALL, nullptr},
    {"dicts_are", cast(dicts_are), METH_FASTCALL, nullptr},
    {"codes", codes, METH_O, nullptr},
    {"codes_are", cast(codes_are), METH_FASTCALL, nullptr},
#if PY_VERSION_HEX < 0x030C0000
    {"versions", versions, METH_O, nullptr},
    {"versions_are", cast(versions_are), METH_FASTCALL, nullptr},
#endif
    {"references", references, METH_O, nullptr},
    {"are_alone", cast(are_alone), METH_FASTCALL, nullptr},
    {"aliases", cast(aliases), METH_FASTCALL, nullptr},
    {"resized", cast(resized), METH_FASTCALL, nullptr},
    {"held_once", cast(held_once), METH_FASTCALL, nullptr},
    {"store", cast(store), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "step_loops", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_step_loops() {
  return PyModule_Create(&definition);
}
